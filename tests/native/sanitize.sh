#!/bin/bash
# The kernel tests on a build of the C files with AddressSanitizer and UndefinedBehaviorSanitizer:
#   tests/native/sanitize.sh PYTHON [pytest arguments]
# HF_INT8_PAGED_FUZZ chooses how many random calls of each public function are made (tests/kernels/test_fuzz.py).
# Torch's allocations are ASan's too, so a read or write past the end of a pool, table or mask is seen.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
shift
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags=$($python -c 'import re, pathlib; print(*re.findall(r"\"(-[^O\"]\S*)\"", pathlib.Path("setup.py").read_text()))')
# -O1: the sanitizers then see every access that the source makes.
${CC:-gcc} -O1 -g $flags -fPIC -shared -fsanitize=address,undefined -fno-sanitize-recover=all \
    kernels/torch-ext/int8_paged_attention/cpu/src/*.c -lm -o "$build/sanitized.so"
runtime=$(${CC:-gcc} -print-file-name=libasan.so):$(${CC:-gcc} -print-file-name=libubsan.so)
sanitized() {
    LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 HF_INT8_PAGED_CPU_LIBRARY=$build/sanitized.so OMP_NUM_THREADS=2 \
        HF_INT8_PAGED_FUZZ=${HF_INT8_PAGED_FUZZ:-2000} $python -m pytest -q -p no:cacheprovider "$@"
}
for isa in $($python -c 'from hf_int8_paged.kernels.cpu import backend as cpu; print(*cpu.isas())'); do
    echo "== $isa"
    HF_INT8_PAGED_CPU_ISA=$isa sanitized tests/kernels/test_append.py tests/kernels/test_decode.py \
        tests/kernels/test_gather_copy.py tests/kernels/test_layouts.py tests/kernels/test_fresh.py \
        tests/kernels/test_ragged.py tests/kernels/test_segments.py tests/kernels/test_fuzz.py tests/kernels/test_fuzz_ragged.py -k "cpu and not million and not reference" "$@"
done
echo "== all instruction sets, one after the other"
sanitized tests/kernels/test_cpu_extend.py "$@"
