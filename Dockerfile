# The plugin's root file system; `make plugin BASE=debian:12-slim` uses it. The
# result is the same as that of `make base`, which needs no registry.
ARG BASE=debian:12-slim
FROM ${BASE} AS debian
RUN command -v mkfs.btrfs >/dev/null || { \
	apt-get update && \
	apt-get install -y --no-install-recommends btrfs-progs busybox-static ca-certificates e2fsprogs mount util-linux xfsprogs; }
COPY plugin/rootfs.sh /
RUN sh /rootfs.sh / /rootfs

FROM scratch
COPY --from=debian /rootfs /
COPY build/flocker-plugin /usr/bin/flocker-plugin
