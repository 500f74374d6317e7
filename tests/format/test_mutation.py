"""Testing the tests: each rule is deleted in turn, and some conformance vector must then get a wrong verdict (R25)."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import make_vectors
import pytest

import spqr_format

PACKAGE = Path(spqr_format.__file__).parent
FILES = ("header", "metadata", "reader", "payload", "validate", "layout")

# Rules that no small file breaks, and the test that shows them instead.
BEYOND_VECTORS = {
    ("header", "E001", "the file ends at"): "test_reader::test_a_file_that_changes_after_the_check",
    ("reader", "E001", "the file ends at byte"): "test_reader::test_a_file_that_changes_after_the_check",
    ("header", "E006", "tensors, the limit is"): "test_limits::test_too_many_tensors",
    ("header", "E006", "lists in the header"): "test_limits::test_too_many_lists",
    ("reader", "E006", "shards, the limit is"): "test_limits::test_too_many_shards",
    ("reader", "E006", "the limit is"): "test_limits::test_too_long_json",
    ("reader", "E402", "not a file"): "test_limits::test_a_folder_called_model_safetensors",
    ("reader", "E405", "is a link that leaves the folder"): "test_reader::test_links",
    ("layout", "E104", "expected at least 1"): "test_packing::test_layouts_that_do_not_exist",
    ("layout", "E104", "expected one of"): "test_packing::test_layouts_that_do_not_exist",
    ("layout", "E104", "expected bilevel or direct"): "test_packing::test_layouts_that_do_not_exist",
    ("header", "E001", "the header alone needs"): "the read that follows finds it too; here no memory is taken first",
    ("metadata", "E104", "not JSON"): "the schema that follows refuses it too; here the message is better",
    ("payload", "E107", "the tensor is missing"): "test_outliers::test_tensors_that_do_not_fit_the_layout",
    ("payload", "E109", "expected"): "test_outliers::test_tensors_that_do_not_fit_the_layout",
    ("payload", "E110", "expected"): "test_outliers::test_tensors_that_do_not_fit_the_layout",
}  # fmt: skip

RUNNER = """
import json, sys
from pathlib import Path
import spqr_format
assert spqr_format.__file__.startswith(sys.argv[1]), spqr_format.__file__
from spqr_format.validate import validate
for line in sys.stdin.read().split("\\n"):
    path, want = line.split("\\t")
    try:
        found = [finding.code for finding in validate(path, deep=True).findings]
    except Exception as error:
        found = [type(error).__name__]
    if found != want.split():
        print(path, want, found)
        break
"""


class Delete(ast.NodeTransformer):
    """Replaces the statement that raises or yields an error at one line by `pass`."""

    def __init__(self, line: int) -> None:
        self.line, self.deleted = line, 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.Raise, ast.Expr)) and node.lineno == self.line:
            self.deleted += 1
            return ast.copy_location(ast.Pass(), node)
        return super().generic_visit(node)


def sites() -> list[tuple[str, int, str, str]]:
    """(file, line, code, text) of every statement that raises or yields a SpqrError of the format's own rules."""
    found = []
    for name in FILES:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            value = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Expr) else None
            if isinstance(value, (ast.Yield, ast.YieldFrom)):
                value = value.value
            text = ast.unparse(value) if value is not None else ""
            calls = ("SpqrError(", "_dirty(", "_not_finite(", "_masked_rows(", "_perm(", "_positions(", "_nothing(")
            if isinstance(value, ast.Call) and text.startswith(calls):
                code = next((a.value for a in value.args if isinstance(a, ast.Constant) and str(a.value).startswith("E")), "?")
                found.append((name, node.lineno, str(code), text))
    return found


def excused(site: tuple[str, int, str, str]) -> bool:
    name, _, code, text = site
    return any((name, code) == key[:2] and key[2] in text for key in BEYOND_VECTORS)


SITES = [site for site in sites() if not excused(site)]


def test_there_are_as_many_sites_as_rules():
    assert len(SITES) > 60
    assert {code for _, _, code, _ in SITES} >= {code for code in spqr_format.CODES if "E0" < code < "E5"} - {
        "E205",
        "E204",
        "E202",
    }


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site[0]}-{site[1]}-{site[2]}")
def test_a_deleted_rule_is_noticed(tmp_path, site):
    name, line, code, _ = site
    shutil.copytree(PACKAGE, tmp_path / "spqr_format", ignore=shutil.ignore_patterns("__pycache__", "cli"))
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    delete = Delete(line)
    tree = ast.fix_missing_locations(delete.visit(tree))
    assert delete.deleted == 1
    (tmp_path / "spqr_format" / f"{name}.py").write_text(ast.unparse(tree))
    records = [(json.loads(path.read_text()).get("code", ""), path) for path in make_vectors.VECTORS.glob("*/*.json")]
    records.sort(key=lambda record: record[0] != code)  # the likeliest first
    lines = []
    for want, path in records:
        content = path.with_suffix("") if path.with_suffix("").is_dir() else path.with_suffix(".safetensors")
        lines.append(f"{content}\t{want}")
    done = subprocess.run([sys.executable, "-c", RUNNER, str(tmp_path)], input="\n".join(lines), capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=True)  # fmt: skip
    assert done.stdout, "every vector still gets its verdict"
