"""What kind of file system a path lies on."""

from __future__ import annotations

from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = ("nfs", "nfs4", "lustre", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "beegfs", "gpfs", "afs", "fuse.")


def network_mount(path: Path) -> tuple[str, str] | None:
    """Type and mount options of the file system, if other machines may write to it too; None on a local disk."""
    mount = _mount_of(path)
    if mount is None:
        return None
    kind, _ = mount
    shared = any(kind == each or (each.endswith(".") and kind.startswith(each)) for each in _NETWORK)
    return mount if shared else None


def _mount_of(path: Path) -> tuple[str, str] | None:
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:  # no Linux
        return None
    path, best, found = path.resolve(), -1, None
    for line in lines:
        # 36 35 98:0 /root /mount/point rw,noatime - type source options
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(" ", 2)
        point = Path(fields[4].encode().decode("unicode_escape"))  # spaces are written as \040
        if path.is_relative_to(point) and len(point.parts) >= best:  # of two mounts on one place, the later one is seen
            best, found = len(point.parts), (kind, f"{fields[5]},{options}")
    return found
