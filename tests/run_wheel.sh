#!/usr/bin/env bash
# Build the sdist and the wheel, check them, install the wheel in a fresh environment, and use it without the sources:
#     pip install build twine && bash tests/run_wheel.sh [options for pip install]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m build --outdir "$work/dist" "$root"
python -m twine check --strict "$work"/dist/*
python -m venv "$work/venv"
wheel=$(echo "$work"/dist/*.whl)
"$work/venv/bin/python" -m pip install --quiet "$@" "$wheel[plots]"

mkdir "$work/run"
cp "$root/tests/support/stock_script.py" "$work/run"
cd "$work/run"
python() { "$work/venv/bin/python" "$@"; }
settings=(
    stock_script.py --use_cpu --per_device_train_batch_size 4 --num_train_epochs 1
    --logging_steps 1 --save_strategy no --report_to none
)
python -c "import hf_nsf; print(hf_nsf.__file__, hf_nsf.NSF, hf_nsf.LCAM)" | grep site-packages
for optim in nsf lcam; do
    python -m hf_nsf "${settings[@]}" --output_dir "$optim" --optim "$optim"
    grep --quiet "\"${optim}_" "$optim/trainer_state.json"
done
python -m hf_nsf.plots nsf lcam --output runs.png
python -m hf_nsf.compare --output_dir cmp --optims adamw_torch nsf lcam --learning_rates 1 --seeds 1 \
    --metric train_loss -- "${settings[@]}"
test -s runs.png && test -s cmp/comparison.png && cat cmp/comparison.md
