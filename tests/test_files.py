"""Files are written whole or not at all, never through a link, with the permissions of any new file."""

import errno
import os
import re

import pytest

from pyro_vae.files import forget_partial, holds_anything, open_own, whole


def test_half_a_file_is_none_and_the_old_one_stays(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("old")

    def half(error):
        with whole(path) as partial:
            partial.write_text("half of the n")
            raise error

    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'")):
        half(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        half(KeyboardInterrupt())
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("table.md", "old")]
    with whole(path) as partial:
        partial.write_text("new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("table.md", "new")]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole(tmp_path / "a") as partial:
            partial.write_text("a")
        open_own(tmp_path / "b").close()
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o666 & ~umask] * 2


def test_links_are_replaced_and_never_followed(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.write_text("precious")
    run.mkdir()
    for name in ("a", "a.partial", "log"):
        (run / name).symlink_to(outside)
    with whole(run / "a") as partial:
        partial.write_text("mine")
    with pytest.raises(OSError, match=r"symbolic links|Too many levels"):
        open_own(run / "log")
    (run / ".claims").symlink_to(tmp_path)
    with pytest.raises(OSError, match="claims is a link"):
        open_own(run / ".claims" / "outside")
    os.mkfifo(run / "fifo")
    with pytest.raises(OSError, match="is no file"):
        open_own(run / "fifo")
    assert outside.read_text() == "precious"
    assert not (run / "a").is_symlink()
    assert (run / "a").read_text() == "mine"


def test_a_new_file_takes_nobodys_place(tmp_path):
    for name in ("file", "link"):
        path = tmp_path / name
        path.write_text("first") if name == "file" else path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError), whole(path, new=True) as partial:
            partial.write_text("second")
    assert (tmp_path / "file").read_text() == "first"
    assert not (tmp_path / "nowhere").exists()


def test_what_a_killed_process_left_is_nothing(tmp_path):
    (tmp_path / "config.yaml.12-ab.partial").write_text("ep")
    assert not holds_anything(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert holds_anything(tmp_path)
    forget_partial(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]
