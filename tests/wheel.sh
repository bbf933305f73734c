#!/usr/bin/env bash
# Build sdist and wheel, install the wheel into an environment of its own, and plan a run from outside the checkout.
# `bash tests/wheel.sh PYTHON`, where PYTHON's environment has the dependencies and `build`.
set -euo pipefail
python=$1
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# a clean copy: what an earlier build left behind must not get into this one; links stay links
mkdir "$work/source"
tar -C "$checkout" -c --exclude=./.venv --exclude=./.git --exclude=./runs --exclude=./build --exclude=./dist \
  --exclude='*.egg-info' --exclude=__pycache__ . | tar -C "$work/source" -x
"$python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || { tail -n 40 "$work/build.log" >&2; exit 1; }

wheel=$(echo "$work"/dist/dist_ft-*.whl)
"$python" - "$wheel" "$checkout" <<'PY'
import pathlib, sys, zipfile

names = set(zipfile.ZipFile(sys.argv[1]).namelist())
checkout = pathlib.Path(sys.argv[2])
tops = {name.split("/")[0] for name in names}
assert all(top == "dist_ft" or top.endswith(".dist-info") for top in tops), f"top-level names in the wheel: {tops}"
wanted = [path for folder in ("conf", "launch", "slurm") for path in (checkout / folder).rglob("*")]
wanted = {f"dist_ft/{path.relative_to(checkout)}" for path in wanted if path.suffix in {".yaml", ".py", ".sbatch"}}
wanted |= {str(path.relative_to(checkout)) for path in (checkout / "dist_ft").rglob("*") if path.suffix in {".py", ".jsonl", ".jinja", ".css", ".js"}}
missing = sorted(wanted - names)
assert not missing, f"not in the wheel: {missing}"
PY

"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --quiet --quiet --disable-pip-version-check --python "$work/venv/bin/python" install --no-deps --no-index "$wheel"
# the dependencies of PYTHON's environment; a path in a .pth file does not bring that environment's own editable installs
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"

mkdir "$work/elsewhere"
cd "$work/elsewhere"
export PATH=$work/venv/bin:$(dirname "$python"):$PATH
home=$("$work/venv/bin/python" -c 'import dist_ft; print(dist_ft.__file__)')
[[ $home == "$work"/venv/* ]] || { echo "dist_ft was imported from $home, not from the wheel" >&2; exit 1; }
"$work/venv/bin/dist-ft" --help >/dev/null
"$work/venv/bin/dist-ft" plan experiment=quickstart >"$work/plan.log" 2>&1 || { tail -n 40 "$work/plan.log" >&2; exit 1; }
[[ ! -e runs/quickstart/logs ]] || { echo 'plan started workers' >&2; exit 1; }
echo "the wheel works outside the checkout ($(basename "$wheel"))"
