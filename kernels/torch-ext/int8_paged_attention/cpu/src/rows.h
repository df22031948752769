/* Rows of float32, float16 or bfloat16, and the transforms of ../../conditioning.py on them.
 *
 * A row is worked on in a float buffer of `padded(dim)` elements; the padding is 0. */
#ifndef ROWS_H
#define ROWS_H

#include "int8_paged.h"
#include "vec16.h"

INLINE int64_t padded(int64_t dim) { return (dim + 15) & ~(int64_t)15; }
INLINE int64_t dtype_bytes(int64_t dtype) { return dtype == DTYPE_FLOAT32 ? 4 : 2; }

INLINE vf load16(const void *src, int64_t dtype, int64_t i)
{
    if (dtype == DTYPE_FLOAT32) return vf_load((const float *)src + i);
    if (dtype == DTYPE_FLOAT16) return vf_load_half((const uint16_t *)src + i);
    return vf_load_bfloat((const uint16_t *)src + i);
}

INLINE void store16(void *dst, int64_t dtype, int64_t i, vf x)
{
    if (dtype == DTYPE_FLOAT32)
        vf_store((float *)dst + i, x);
    else if (dtype == DTYPE_FLOAT16)
        vf_store_half((uint16_t *)dst + i, x);
    else
        vf_store_bfloat((uint16_t *)dst + i, x);
}

static void load_row(float *row, const void *src, int64_t dtype, int64_t dim)
{
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) vf_store(row + i, load16(src, dtype, i));
    if (i < dim) {
        float last[16] = {0};
        memcpy(last, (const char *)src + i * dtype_bytes(dtype), (size_t)((dim - i) * dtype_bytes(dtype)));
        vf_store(row + i, load16(last, dtype, 0));
    }
}

static void store_row(void *dst, const float *row, int64_t dtype, int64_t dim)
{
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) store16(dst, dtype, i, vf_load(row + i));
    if (i < dim) {
        float last[16];
        store16(last, dtype, 0, vf_load(row + i));
        memcpy((char *)dst + i * dtype_bytes(dtype), last, (size_t)((dim - i) * dtype_bytes(dtype)));
    }
}

/* a + b and a - b inside a vector: the lanes whose bit `distance` is set are the b. */
INLINE vf butterfly(vf x, int distance, vm sign)
{
    return vf_swap(x, distance) + (vf)((vm)x ^ sign);
}

/* The float32 operations of conditioning.hadamard, in its order, so that the bits are the same. In place. */
static void hadamard_row(float *row, int64_t dim)
{
    const int64_t n = dim & -dim, width = padded(dim);
    const int32_t m = (int32_t)0x80000000;
    const vm sign1 = {0, m, 0, m, 0, m, 0, m, 0, m, 0, m, 0, m, 0, m};
    const vm sign2 = {0, 0, m, m, 0, 0, m, m, 0, 0, m, m, 0, 0, m, m};
    const vm sign4 = {0, 0, 0, 0, m, m, m, m, 0, 0, 0, 0, m, m, m, m};
    const vm sign8 = {0, 0, 0, 0, 0, 0, 0, 0, m, m, m, m, m, m, m, m};
    const vf factor = vf_set1((float)(1 / sqrt((double)n)));
    for (int64_t i = 0; i < width; i += 16) {
        vf x = vf_load(row + i);
        if (n > 1) x = butterfly(x, 1, sign1);
        if (n > 2) x = butterfly(x, 2, sign2);
        if (n > 4) x = butterfly(x, 4, sign4);
        if (n > 8) x = butterfly(x, 8, sign8);
        if (n <= 16) x *= factor;
        vf_store(row + i, x);
    }
    for (int64_t distance = 16; distance < n; distance *= 2) {
        const vf last = 2 * distance == n ? factor : vf_set1(1.0f);
        for (int64_t i = 0; i < width; i += 2 * distance)
            for (int64_t j = i; j < i + distance; j += 16) {
                const vf a = vf_load(row + j), b = vf_load(row + j + distance);
                vf_store(row + j, (a + b) * last);
                vf_store(row + j + distance, (a - b) * last);
            }
    }
}

static float largest_magnitude(const float *row, int64_t dim, int *finite)
{
    vf largest = {0}, zero = {0};
    for (int64_t i = 0; i < dim; i += 16) {
        const vf x = vf_load(row + i);
        largest = vf_max(largest, vf_abs(x)); /* never NaN: vf_max(a, NaN) may be; checked by `zero` */
        zero += x - x;                        /* NaN if x is NaN or infinite */
    }
    const vf fault = zero;
    *finite = 1;
    for (int lane = 0; lane < 16; lane++)
        if (fault[lane] != 0) *finite = 0;
    return *finite ? vf_reduce_max(largest) : 0.0f;
}

static void hadamard_rows(float *out, const float *x, int64_t rows, int64_t dim)
{
    float row[MAX_DIM];
    for (int64_t i = 0; i < rows; i++) {
        load_row(row, x + i * dim, DTYPE_FLOAT32, dim);
        hadamard_row(row, dim);
        store_row(out + i * dim, row, DTYPE_FLOAT32, dim);
    }
}

#endif
