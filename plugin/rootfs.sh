#!/bin/sh
# Usage: rootfs.sh DEBIAN OUT
#
# Makes the plugin's root file system in OUT from the Debian tree DEBIAN: the
# tools that make, check and grow file systems, the libraries they load, the
# certificate authorities, and a shell for whoever has to look inside. Nothing
# else, because Docker copies all of it at each install and upgrade.
set -eu
debian=${1%/} out=$2

tools='mke2fs e2fsck resize2fs tune2fs dumpe2fs debugfs chattr lsattr
	mkfs.xfs xfs_repair xfs_db xfs_growfs xfs_io xfs_spaceman xfs_admin xfs_info
	mkfs.btrfs btrfs btrfstune
	blkid blockdev losetup mount umount'

mkdir -p "$out/usr/bin" "$out/usr/sbin" "$out/usr/lib" "$out/usr/lib64" "$out/etc/ssl/certs" \
	"$out/dev" "$out/proc" "$out/sys" "$out/run/docker/plugins" "$out/tmp" "$out/var/lib/flocker" \
	"$out/flocker/mnt" "$out/host/run"
for dir in bin sbin lib lib64; do ln -sfn "usr/$dir" "$out/$dir"; done

loader=$(cd "$debian/" && ls -d lib*/ld-linux-*.so.* | head -n 1)
for tool in $tools busybox; do
	path=
	for dir in usr/sbin usr/bin sbin bin; do
		if [ -e "$debian/$dir/$tool" ]; then path=$dir/$tool; fi
	done
	if [ -z "$path" ]; then
		echo "rootfs.sh: $tool is not in $debian/" >&2
		exit 1
	fi
	cp -L "$debian/$path" "$out/usr/sbin/$tool"
	[ "$tool" != busybox ] || continue # it is static, and the loader crashes on it
	chroot "$debian/" "/$loader" --list "/$path" 2>/dev/null | grep -o '/[^ ]*\.so[^ ]*' | while read -r lib; do
		if [ ! -e "$out$lib" ]; then
			mkdir -p "$out${lib%/*}"
			cp -L "$debian$lib" "$out$lib"
		fi
	done || true
done

ln -sfn mke2fs "$out/usr/sbin/mkfs.ext4"
ln -sfn e2fsck "$out/usr/sbin/fsck.ext4"
for name in sh cat ls ps kill grep sed awk dd df du stat mkdir rm rmdir cp mv ln sleep true head tail vi wget; do
	ln -sfn ../sbin/busybox "$out/usr/bin/$name"
done
cp -L "$debian/etc/mke2fs.conf" "$out/etc/mke2fs.conf"
cat "$debian"/usr/share/ca-certificates/mozilla/*.crt >"$out/etc/ssl/certs/ca-certificates.crt"
echo 'root:x:0:0:root:/:/bin/sh' >"$out/etc/passwd"
echo 'root:x:0:' >"$out/etc/group"
