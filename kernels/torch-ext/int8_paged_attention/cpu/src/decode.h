/* Decode attention in the integer domain (DESIGN.md section 6), included once per instruction set.
 *
 * For each tile of 64 tokens: integer products of the split query with K, scores, online softmax, weights times
 * V scales split into integers, integer products with V. K and V are never converted to float. */
#include "decode_first_tokens.h"

#include <stdatomic.h>

INLINE void attend_rows(State *st, int r0, const Tile *tile, Prefetch *ahead, const Scales *scales,
                        int64_t step_bytes, const int rows)
{
    const int subtiles = KEY_SUBTILES(rows), vectors = VALUE_VECTORS(rows);
    _Alignas(64) float scores[MAX_TILE_ROWS][TILE_TOKENS];
    _Alignas(64) uint8_t weights[MAX_TILE_ROWS][TILE_SUBTILES][32];
    float old[MAX_TILE_ROWS], factor[MAX_TILE_ROWS], most[MAX_TILE_ROWS];
    Prefetch own = *ahead, *prefetch = PREFETCH_IN_MEMORY(rows) ? ahead : &own; /* `own` is kept in registers */
    int s = 0;
    for (; s + subtiles <= tile->count; s += subtiles)
        key_products(st, r0, tile, prefetch, s, step_bytes, scores, rows, subtiles, 0, TERMS);
    if (subtiles > 1)
        for (; s < tile->count; s++) key_products(st, r0, tile, prefetch, s, step_bytes, scores, rows, 1, 0, TERMS);
    if (scales->refine)
        for (s = 0; s < tile->count; s++) key_products(st, r0, tile, prefetch, s, step_bytes, scores, rows, 1, TERMS, 1);
    /* Each step waits for a reduction in the one before: taken row by row, the processor could not overlap them. */
    for (int r = 0; r < rows; r++) most[r] = scale_scores(st, r0 + r, tile, scales, scores[r]);
    for (int r = 0; r < rows; r++) most[r] = weigh_scores(st, r0 + r, tile, scales, scores[r], most[r], &old[r]);
    for (int r = 0; r < rows; r++) {
        const int some = most[r] > 1e-30f;
        factor[r] = some ? most[r] * (1.0f / WEIGHT_MAX) : 0.0f;
        const float inverse = some ? WEIGHT_MAX / most[r] : 0.0f;
        for (s = 0; s < tile->count; s++) pack_weights(weights[r][s], scores[r] + s * SUBTILE, inverse);
    }
    const int64_t dim = st->v_head_dim;
    int64_t d = 0;
    for (; d + vectors * LANES <= dim; d += vectors * LANES)
        value_products(st, r0, tile, prefetch, d, weights, old, factor, rows, vectors, 0);
    for (; d + LANES <= dim; d += LANES) value_products(st, r0, tile, prefetch, d, weights, old, factor, rows, 1, 0);
    if (d < dim) value_products(st, r0, tile, prefetch, d, weights, old, factor, rows, 1, (int)(dim - d));
    if (!PREFETCH_IN_MEMORY(rows)) *ahead = own;
}

#define ATTEND_ROWS(n)                                                                                             \
    static __attribute__((noinline)) void attend_rows_##n(State *st, int r0, const Tile *tile, Prefetch *prefetch,     \
                                                          const Scales *scales, int64_t step_bytes)                  \
    {                                                                                                                \
        attend_rows(st, r0, tile, prefetch, scales, step_bytes, n);                                                      \
    }
ATTEND_ROWS(1)
ATTEND_ROWS(2)
#if MAX_TILE_ROWS > 2
ATTEND_ROWS(3)
#endif
#if MAX_TILE_ROWS > 3
ATTEND_ROWS(4)
#endif

static void attend_tile(State *st, const Tile *tile, const Tile *next, const Layer *layer)
{
    const int64_t step_bytes = layer->block_size * 4;
    Scales scales;
    load_scales(st, tile, &scales);
    Prefetch ahead = start_prefetch(next, layer);
    const int tiles = (st->rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int i = 0; i < tiles; i++) {
        const int from = st->rows * i / tiles, to = st->rows * (i + 1) / tiles;
        switch (to - from) {
        case 1: attend_rows_1(st, from, tile, &ahead, &scales, step_bytes); break;
#if MAX_TILE_ROWS > 2
        case 3: attend_rows_3(st, from, tile, &ahead, &scales, step_bytes); break;
#endif
#if MAX_TILE_ROWS > 3
        case 4: attend_rows_4(st, from, tile, &ahead, &scales, step_bytes); break;
#endif
        default: attend_rows_2(st, from, tile, &ahead, &scales, step_bytes);
        }
    }
}

/* Join the partial rows of all splits and the sink, divide, rotate back, add the first tokens and store. Row of a
 * partial: maximum, sum, then the sum of weight * value; a sum of NaN marks a fault and makes the row NaN. */
static void finish_row(const DecodePlan *plan, int64_t sequence, int64_t head, int64_t row, const float *partial,
                       int64_t split_stride)
{
    const DecodeCall *call = plan->call;
    const int64_t dim = plan->layer->v_head_dim, q_head = head * plan->group + row / call->q_len;
    const float sink = call->sink_logits ? call->sink_logits[q_head] * LOG2_E : -INFINITY;
    float highest = sink, total, out[MAX_DIM] = {0}, scores[MAX_FIRST_TOKENS];
    const int64_t first_tokens = first_scores(plan, sequence, head, row, scores);
    for (int64_t s = 0; s < plan->splits; s++) highest = larger(highest, partial[s * split_stride]);
    for (int64_t i = 0; i < first_tokens; i++) highest = larger(highest, scores[i]);
    if (highest == -INFINITY) highest = 0;
    total = sink == sink ? exp2f(sink - highest) : sink;
    for (int64_t s = 0; s < plan->splits; s++) {
        const float *p = partial + s * split_stride, weight = exp2f(p[0] - highest);
        total += p[1] * weight;
        for (int64_t d = 0; d < dim; d++) out[d] += p[PARTIAL_HEAD + d] * weight;
    }
    for (int64_t i = 0; i < first_tokens; i++) total += scores[i] = exp2f(scores[i] - highest);
    const float inverse = total == 0 ? 0.0f : 1 / total;
    for (int64_t d = 0; d < dim; d++) out[d] *= inverse;
    if (plan->layer->rotate) hadamard_row(out, dim);
    for (int64_t i = 0; i < first_tokens; i++) {
        float v[MAX_DIM];
        if (scores[i] == 0) continue; /* not seen, perhaps: it may hold anything */
        load_first_row(v, plan, sequence, head, i, 1);
        for (int64_t d = 0; d < dim; d++) out[d] += scores[i] * inverse * v[d];
    }
    const int64_t *stride = call->out_strides;
    const int64_t at = sequence * stride[0] + q_head * stride[1] + row % call->q_len * stride[2];
    store_row((char *)call->out + at * dtype_bytes(call->dtype), out, call->dtype, dim);
}

/* Items numbered [sequence, kv head, row block, split]. Whoever finishes the last split joins them all. */
static void decode_item(const DecodePlan *plan, int64_t item)
{
    const DecodeCall *call = plan->call;
    const Layer *layer = plan->layer;
    const int64_t split = item % plan->splits, unit = item / plan->splits, row_block = unit % plan->row_blocks;
    const int64_t head = unit / plan->row_blocks % layer->num_kv_heads;
    const int64_t sequence = unit / plan->row_blocks / layer->num_kv_heads;
    int64_t begin, end;
    visible_range(call, sequence, call->table.lengths[sequence] - call->q_len, &begin, &end);
    begin += split * plan->split_tokens;
    end = min_i64(end, begin + plan->split_tokens);

    Cursor cursor = {layer, call->table.ids + sequence * call->table.stride,
                     call->key_mask ? call->key_mask + sequence * call->mask_stride : NULL,
                     call->mask_start, call->mask_columns, head, begin, end,
                     begin / layer->block_size, begin % layer->block_size, layer->segments};
    Tile tiles[2];
    next_tile(&cursor, &tiles[0]);
    Prefetch first_tile = start_prefetch(&tiles[0], layer);
    while (first_tile.stride) prefetch_line(&first_tile); /* it comes while the queries are split */
    State st;
    load_queries(&st, plan, sequence, head, row_block, begin, end);
    for (int i = 0; tiles[i].count; i ^= 1) {
        Tile *next = &tiles[i ^ 1];
        next_tile(&cursor, next);
        attend_tile(&st, &tiles[i], next, layer);
    }

    const int64_t row_floats = plan->partial_floats;
    float single[PARTIAL_HEAD + MAX_DIM];
    float *partial = plan->splits == 1 ? single : plan->partials + (unit * plan->splits + split) * plan->partial_rows * row_floats;
    for (int r = 0; r < st.rows; r++) {
        float *p = plan->splits == 1 ? single : partial + r * row_floats;
        p[0] = st.highest[r];
        p[1] = st.fault[r] ? NAN : vn_reduce_sum(vn_load(st.sums[r]));
        memcpy(p + PARTIAL_HEAD, st.out[r], (size_t)st.v_head_dim * sizeof(float));
        if (plan->splits == 1) finish_row(plan, sequence, head, row_block * ROW_BLOCK + r, p, 0);
    }
    if (plan->splits == 1) return;
    _Atomic int32_t *pending = (_Atomic int32_t *)&plan->pending[unit];
    if (atomic_fetch_sub_explicit(pending, 1, memory_order_acq_rel) > 1) return;
    const float *first = plan->partials + unit * plan->splits * plan->partial_rows * row_floats;
    for (int r = 0; r < st.rows; r++)
        finish_row(plan, sequence, head, row_block * ROW_BLOCK + r, first + r * row_floats,
                   plan->partial_rows * row_floats);
}
