#!/bin/bash
# Cross-compile the C files for 64-bit Arm and check them under an emulator (Debian: gcc-aarch64-linux-gnu, qemu-user).
# Without an emulator's `dotprod` the check fails, as it would test the portable code only.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
source=kernels/torch-ext/int8_paged_attention/cpu/src
${CC:-aarch64-linux-gnu-gcc} -O3 -std=gnu11 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi \
    -static -I$source $source/*.c tests/native/check.c -lm -o "$build/check"
${QEMU-qemu-aarch64 -cpu max} "$build/check" neon
