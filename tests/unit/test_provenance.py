"""Where and when a measurement was made."""

import re
import runpy
import shutil
import subprocess

from mtp_dist import provenance


def test_commit_names_changes_of_tracked_files(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / "package").mkdir()
    module = shutil.copy(provenance.__file__, tmp_path / "package")
    commit = runpy.run_path(module)["checkout_commit"]
    (tmp_path / "docs" / "data").mkdir(parents=True)
    result = tmp_path / "docs" / "data" / "result.json"
    for file in (tmp_path / "notes", result):
        file.touch()
    git("add", "notes", "docs")
    git("commit", "--quiet", "--message=other")
    assert commit() is None, "it is not a file of the repository that it is installed in"
    git("add", "package")
    git("commit", "--quiet", "--message=package")
    git("tag", "v1")
    clean = commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "untracked").touch()
    result.write_text("measured again")
    assert commit() == clean
    (tmp_path / "notes").write_text("changed")
    assert commit() == f"{clean}+changes"
    monkeypatch.setenv("PATH", "")
    assert commit() is None
