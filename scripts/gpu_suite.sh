#!/bin/sh
# What needs a CUDA GPU, in one go; one step that fails does not stop the next.
#
#   OUT=outputs/gpu scripts/gpu_suite.sh [STEP ...]     # steps: info tests train sd3; default all
#
# $PYTHON is the interpreter that has the package (default: python of the active environment). Writes $OUT/<step>.log, the
# benchmarks' JSON, and $OUT/summary.txt, a line a step. About ten minutes on one GPU with 80 GB.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-outputs/gpu}
python=${PYTHON:-python}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false PYTHONPATH=.

step() { # name, command ...
  name=$1
  shift
  start=$(date +%s)
  "$@" >"$out/$name.log" 2>&1
  code=$?
  echo "$name: exit $code, $(($(date +%s) - start)) s" | tee -a "$out/summary.txt"
}

info() {
  "$python" -c '
import accelerate, diffusers, peft, torch, transformers
print("torch", torch.__version__, "CUDA", torch.version.cuda)
for module in (accelerate, diffusers, peft, transformers):
    print(module.__name__, module.__version__)
assert torch.cuda.is_available(), "no CUDA device"
for index in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(index)
    print(found.name, round(found.total_memory / 2**30, 1), "GiB")
'
}

benchmark() { # size
  "$python" scripts/benchmark.py train --size "$1" --json >"$out/train_$1.json"
}

for name in "${@:-info tests train sd3}"; do
  for one in $name; do
    case $one in
    info) step info info ;;
    tests) step tests "$python" -m pytest -q -m gpu ;;
    train) step train benchmark small ;;
    sd3) step sd3 benchmark sd3-medium ;;
    *)
      echo "no step $one; steps: info tests train sd3" >&2
      exit 2
      ;;
    esac
  done
done
cat "$out/summary.txt"
