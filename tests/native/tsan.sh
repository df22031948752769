#!/bin/bash
# The C files under ThreadSanitizer: check.c, with four callers at once, each of whose calls is shared among three threads.
#   tests/native/tsan.sh
# First with a race put into the work queue, which ThreadSanitizer must report: otherwise its silence says nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r kernels/torch-ext/int8_paged_attention/cpu/src "$build/right"
cp -r "$build/right" "$build/racing"
sed -i 's/atomic_fetch_add_explicit(&queue->next, queue->batch, memory_order_relaxed)/(queue->done += queue->batch) - queue->batch/;
        s/_Atomic int64_t next;/int64_t done;/' "$build/racing/entry.c"
flags="-O1 -g -std=gnu11 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -fsanitize=thread -DTHREADS -pthread"
for name in racing right; do
    ${CC:-gcc} $flags -I"$build/$name" -Itests/native "$build/$name"/*.c tests/native/check.c -lm -o "$build/check_$name"
done
# Address spaces that are laid out at random stop some releases of the sanitizer.
run() { setarch "$(uname -m)" -R "$1" 2>&1; }
echo "== with a race"
if TSAN_OPTIONS=halt_on_error=1 run "$build/check_racing" >"$build/said"; then echo "the race was not reported" && exit 1; fi
grep -m1 "WARNING: ThreadSanitizer: data race" "$build/said"
echo "== without"
run "$build/check_right"
