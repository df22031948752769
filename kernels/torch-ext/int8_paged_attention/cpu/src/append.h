/* Quantize rows and write them into their tiles; read tiles and dequantize them. Arithmetic of ../../reference.py. */
#include "rows.h"

static const float FLOAT16_MAX = 65504.0f;

/* int8 [padded(dim)] and the float16 scale of a conditioned row. */
static uint16_t quantize_row(int8_t *q, const float *row, int64_t dim)
{
    typedef int8_t bytes __attribute__((vector_size(16)));
    int finite;
    const float largest = largest_magnitude(row, dim, &finite);
    if (!finite) {
        memset(q, 0, (size_t)padded(dim));
        return 0x7e00;
    }
    const float exact = largest / 127.0f;
    const uint16_t half = float_to_half(exact < FLOAT16_MAX ? exact : FLOAT16_MAX);
    const vf scale = vf_set1(half ? half_to_float(half) : 1.0f), limit = vf_set1(127.0f);
    for (int64_t i = 0; i < dim; i += 16) {
        const vf x = half ? vf_load(row + i) / scale : (vf){0};
        const vm whole = vf_to_int(vf_max(vf_min(x, limit), -limit));
        const bytes b = __builtin_convertvector(whole, bytes);
        memcpy(q + i, &b, sizeof b);
    }
    return half;
}

static void append_row(const Layer *layer, const void *src, int64_t dtype, int64_t head, int64_t block, int64_t slot,
                       int values)
{
    const int64_t dim = values ? layer->v_head_dim : layer->head_dim, size = layer->block_size;
    float row[MAX_DIM];
    int8_t q[MAX_DIM];
    load_row(row, src, dtype, dim);
    if (!values && layer->key_center) {
        const float *center = layer->key_center + head * dim;
        for (int64_t d = 0; d < dim; d++) row[d] -= center[d];
    }
    if (layer->rotate) hadamard_row(row, dim);
    const uint16_t scale = quantize_row(q, row, dim);
    const Segment *segment = segment_of(layer, layer->segments, block);
    const int64_t at = slots_before(layer, segment, head, block);
    if (values) {
        segment->v_scales[at + slot] = scale;
        int8_t *dst = segment->v + at * dim + slot / 4 * dim * 4 + slot % 4;
        for (int64_t d = 0; d < dim; d++) dst[4 * d] = q[d];
    } else {
        segment->k_scales[at + slot] = scale;
        int8_t *dst = segment->k + at * dim + slot * 4;
        for (int64_t d = 0; d < dim; d += 4) memcpy(dst + d * size, q + d, 4);
    }
}

/* Rows numbered [sequence, kv head, token]. */
static void append_rows(const Layer *layer, const AppendCall *call, int64_t begin, int64_t end)
{
    const int64_t heads = layer->num_kv_heads, tokens = call->tokens, bytes = dtype_bytes(call->dtype);
    for (int64_t i = begin; i < end; i++) {
        const int64_t token = i % tokens, head = i / tokens % heads, sequence = i / tokens / heads;
        const int64_t position = call->table.lengths[sequence] + token;
        const int64_t block = call->table.ids[sequence * call->table.stride + position / layer->block_size];
        if (block < 0) continue;
        const int64_t slot = position % layer->block_size, *ks = call->k_strides, *vs = call->v_strides;
        const char *k = (const char *)call->k_new + (sequence * ks[0] + head * ks[1] + token * ks[2]) * bytes;
        const char *v = (const char *)call->v_new + (sequence * vs[0] + head * vs[1] + token * vs[2]) * bytes;
        append_row(layer, k, call->dtype, head, block, slot, 0);
        append_row(layer, v, call->dtype, head, block, slot, 1);
    }
}

static void gather_row(const Layer *layer, void *out, int64_t dtype, int64_t head, int64_t block, int64_t slot,
                       int values)
{
    const int64_t dim = values ? layer->v_head_dim : layer->head_dim, size = layer->block_size;
    const Segment *segment = segment_of(layer, layer->segments, block);
    const int64_t at = slots_before(layer, segment, head, block);
    const float scale = half_to_float((values ? segment->v_scales : segment->k_scales)[at + slot]);
    float row[MAX_DIM] = {0};
    if (values) {
        const int8_t *src = segment->v + at * dim + slot / 4 * dim * 4 + slot % 4;
        for (int64_t d = 0; d < dim; d++) row[d] = (float)src[4 * d] * scale;
    } else {
        const int8_t *src = segment->k + at * dim + slot * 4;
        for (int64_t d = 0; d < dim; d++) row[d] = (float)src[d / 4 * 4 * size + d % 4] * scale;
    }
    if (layer->rotate) hadamard_row(row, dim);
    if (!values && layer->key_center) {
        const float *center = layer->key_center + head * dim;
        for (int64_t d = 0; d < dim; d++) row[d] += center[d];
    }
    store_row(out, row, dtype, dim);
}

/* Items numbered [sequence, kv head, logical block that holds a position of start..stop]. */
static void gather_blocks(const Layer *layer, const GatherCall *call, int64_t begin, int64_t end)
{
    const int64_t heads = layer->num_kv_heads, size = layer->block_size, bytes = dtype_bytes(call->dtype);
    const int64_t first = call->start / size, blocks = ceil_div(call->stop, size) - first;
    for (int64_t i = begin; i < end; i++) {
        const int64_t logical = first + i % blocks, head = i / blocks % heads, sequence = i / blocks / heads;
        const int64_t block = call->table.ids[sequence * call->table.stride + logical];
        const int64_t from = max_i64(call->start, logical * size), to = min_i64(call->stop, (logical + 1) * size);
        for (int64_t p = from; p < to; p++) {
            const int64_t row = (sequence * heads + head) * (call->stop - call->start) + p - call->start;
            char *k = (char *)call->k_out + row * layer->head_dim * bytes;
            char *v = (char *)call->v_out + row * layer->v_head_dim * bytes;
            if (block < 0 || p >= call->table.lengths[sequence]) {
                memset(k, 0, (size_t)(layer->head_dim * bytes));
                memset(v, 0, (size_t)(layer->v_head_dim * bytes));
            } else {
                gather_row(layer, k, call->dtype, head, block, p % size, 0);
                gather_row(layer, v, call->dtype, head, block, p % size, 1);
            }
        }
    }
}
