#!/bin/bash
# Cross-compile the C files for 64-bit Arm and check them under an emulator (Debian: gcc-aarch64-linux-gnu, qemu-user):
#   tests/native/neon.sh [PYTHON [pytest arguments]]
# First without Python, check.c: 13 shapes. Then, with PYTHON, the Python tests of the kernels: neon_proxy.c takes the
# library's place in their process, and neon_server.c carries out its calls under the emulator. Minutes for both.
# Without an emulator's `dotprod` the check fails, as it would test the portable code only.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
source=kernels/torch-ext/int8_paged_attention/cpu/src
flags="-O3 -std=gnu11 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -pthread -I$source -Itests/native"
for program in check neon_server; do
    ${CC:-aarch64-linux-gnu-gcc} $flags -static $source/*.c tests/native/$program.c -lm -o "$build/$program"
done
emulator=${QEMU-qemu-aarch64 -cpu max}
$emulator "$build/check" neon
if [ -z "${QEMU+set}" ]; then
    echo "== a processor without dotprod"
    qemu-aarch64 -cpu cortex-a72 "$build/check" | tee "$build/without"
    if grep -q '^neon' "$build/without"; then echo "instructions were chosen that are not there" && exit 1; fi
fi
[ $# -gt 0 ] || exit 0

echo "== the Python tests"
python=$1
shift
${HOST_CC:-gcc} $flags -fPIC -shared tests/native/neon_proxy.c -o "$build/proxy.so"
export HF_INT8_PAGED_CPU_LIBRARY=$build/proxy.so HF_INT8_PAGED_NEON_SERVER="$emulator $build/neon_server"
export HF_INT8_PAGED_FUZZ=${HF_INT8_PAGED_FUZZ:-300} OMP_NUM_THREADS=2
$python -c 'from hf_int8_paged.kernels.cpu import backend as cpu; assert cpu.isas() == ["neon", "portable"], cpu.isas()'
# Left out: what measures the memory of this process, as the kernels run in another one.
$python -m pytest -q -p no:cacheprovider tests/kernels/test_append.py tests/kernels/test_decode.py \
    tests/kernels/test_first_tokens.py tests/kernels/test_fresh.py tests/kernels/test_gather_copy.py \
    tests/kernels/test_layouts.py tests/kernels/test_ragged.py tests/kernels/test_segments.py tests/kernels/test_fuzz.py \
    tests/kernels/test_fuzz_ragged.py tests/kernels/test_bad_input.py tests/kernels/test_conditioning.py \
    tests/kernels/test_storage.py tests/kernels/test_cpu.py tests/kernels/test_cpu_extend.py \
    tests/kernels/test_cpu_instruction_sets.py -k "cpu and not reference and not dense_copy" "$@"
