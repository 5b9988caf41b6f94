package rig

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// ImportImage makes the image busybox on every host, from the machine's static
// busybox.
func (r *Rig) ImportImage(ctx context.Context) error {
	image, err := busyboxImage(ctx)
	if err != nil {
		return fmt.Errorf("make the busybox image: %w", err)
	}
	return r.importImage(ctx, image, "busybox", `CMD ["sh"]`, `ENV PATH=/bin`)
}

// ImportProgram makes an image on every host with nothing in it but a static
// program, which its containers run.
func (r *Rig) ImportProgram(ctx context.Context, name, path string) error {
	program, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("make the image %s: %w", name, err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "program", Mode: 0o755, Size: int64(len(program))})
	if err == nil {
		_, err = w.Write(program)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("make the image %s: %w", name, err)
	}
	return r.importImage(ctx, b.Bytes(), name, `ENTRYPOINT ["/program"]`)
}

// importImage makes an image on every host from a tar file, with some lines of a
// Dockerfile.
func (r *Rig) importImage(ctx context.Context, image []byte, name string, changes ...string) error {
	args := []string{"import"}
	for _, change := range changes {
		args = append(args, "--change", change)
	}
	return r.each(func(h *Host) error {
		cmd := h.Command(ctx, "docker", append(args, "-", name)...)
		cmd.Stdin = bytes.NewReader(image)
		_, err := output(cmd, h.Name+": docker import")
		return err
	})
}

func busyboxImage(ctx context.Context) ([]byte, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	applets, err := output(exec.CommandContext(ctx, path, "--list"), "busybox --list")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, dir := range []string{"bin", "dev", "etc", "proc", "sys", "tmp", "root"} {
		mode := int64(0o755)
		if dir == "tmp" {
			mode = 0o1777
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: mode}); err != nil {
			return nil, err
		}
	}
	files := map[string][]byte{
		"bin/busybox": program,
		"etc/passwd":  []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n"),
		"etc/group":   []byte("root:x:0:\nuser:x:1000:\n"),
	}
	for name, data := range files {
		mode := int64(0o644)
		if strings.HasPrefix(name, "bin/") {
			mode = 0o755
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	for applet := range strings.FieldsSeq(applets) {
		if applet == "busybox" {
			continue
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + applet, Linkname: "busybox"}); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
