/* Decode attention in the integer domain (DESIGN.md section 6), included once per instruction set.
 *
 * For each tile of 64 tokens: integer products of the split query with K, scores, online softmax, weights times
 * V scales split into integers, integer products with V. K and V are never converted to float. */
#include "decode_first_tokens.h"

#include <stdatomic.h>

/* Scales of a tile as floats, and what they say about the way to go. */
typedef struct {
    vf k[TILE_SUBTILES], v[TILE_SUBTILES]; /* 0 where no row sees the token, or where it is faulty */
    uint32_t faulty[TILE_SUBTILES];        /* tokens whose key or value held NaN or infinity */
    int plain;                             /* every row sees every token, and none is faulty */
    int refine;                            /* scores need the rest term of q */
} Scales;

/* Bits of the tokens [first, last) of the subtile at `position`. */
INLINE uint32_t token_range(int64_t first, int64_t last, int64_t position)
{
    const int64_t from = max_i64(first - position, 0), to = min_i64(last - position, SUBTILE);
    return from < to ? (1u << to) - (1u << from) : 0;
}

static void load_scales(const State *st, const Tile *tile, Scales *scales)
{
    vf largest = {0}, zero = {0};
    scales->plain = !st->any_faulty_query && !st->capped && tile->position[0] >= st->latest_first &&
                    tile->position[tile->count - 1] + SUBTILE <= st->earliest_last;
    for (int s = 0; s < tile->count; s++) {
        scales->k[s] = vf_load_half(tile->k_scales[s]);
        scales->v[s] = vf_load_half(tile->v_scales[s]);
        scales->faulty[s] = 0;
        scales->plain &= tile->admitted[s] == 0xffff;
    }
    if (!scales->plain)
        for (int s = 0; s < tile->count; s++) {
            const uint32_t in_range = token_range(st->earliest_first, st->latest_last, tile->position[s]);
            const vm seen = vm_from_bits(tile->admitted[s] & in_range);
            scales->k[s] = (vf)((vm)scales->k[s] & seen);
            scales->v[s] = (vf)((vm)scales->v[s] & seen);
        }
    for (int s = 0; s < tile->count; s++) {
        largest = vf_max(scales->k[s], largest);
        zero += scales->k[s] * 0.0f + scales->v[s] * 0.0f; /* NaN where a scale is */
    }
    if (vm_to_bits(zero == 0) != 0xffff) {
        scales->plain = 0;
        largest = vf_set1(0);
        for (int s = 0; s < tile->count; s++) {
            const vm faulty = (scales->k[s] != scales->k[s]) | (scales->v[s] != scales->v[s]);
            scales->faulty[s] = vm_to_bits(faulty);
            scales->k[s] = (vf)((vm)scales->k[s] & ~faulty);
            scales->v[s] = (vf)((vm)scales->v[s] & ~faulty);
            largest = vf_max(scales->k[s], largest);
        }
    }
    scales->refine = vf_reduce_max(largest) * st->error_per_scale > SCORE_TOLERANCE;
}

/* Tokens of a subtile that row r sees and that are sound; notes a fault that it sees. */
static uint32_t visible_tokens(State *st, int r, const Tile *tile, const Scales *scales, int s)
{
    const uint32_t seen = token_range(st->first[r], st->last[r], tile->position[s]) & tile->admitted[s];
    st->fault[r] |= (seen & scales->faulty[s]) || (seen && st->faulty_query[r]);
    return seen & ~scales->faulty[s];
}

/* Integer products -> scores, one row, with masks, softcap and the centre; the slow way. Returns the largest. */
static vf general_scores(State *st, int r, const Tile *tile, const Scales *scales, float *scores)
{
    vf largest = vf_set1(-INFINITY);
    for (int s = 0; s < tile->count; s++) {
        vf x = vf_load(scores + s * SUBTILE) * scales->k[s] * st->factor[r] + st->center_score[r];
        if (st->capped) x = vf_tanh(x / st->softcap) * (st->softcap * LOG2_E);
        x = vf_select(vm_from_bits(visible_tokens(st, r, tile, scales, s)), x, vf_set1(-INFINITY));
        vf_store(scores + s * SUBTILE, x);
        largest = vf_max(x, largest);
    }
    return largest;
}

/* Online softmax of one row over one tile: products -> weights times V scales in integers.
 * *old is the factor on what was summed before, *factor what an integer weight is worth. */
INLINE void weigh_row(State *st, int r, const Tile *tile, const Scales *scales, float *scores,
                      uint8_t (*weights)[32], float *old, float *factor)
{
    vf largest;
    if (scales->plain) {
        const vf f = vf_set1(st->factor[r]), c = vf_set1(st->center_score[r]);
        largest = vf_set1(-INFINITY);
        for (int s = 0; s < tile->count; s++) {
            const vf x = vf_mul_add(vf_load(scores + s * SUBTILE) * scales->k[s], f, c);
            vf_store(scores + s * SUBTILE, x);
            largest = vf_max(x, largest);
        }
    } else {
        largest = general_scores(st, r, tile, scales, scores);
    }
    const float highest = larger(st->highest[r], vf_reduce_max(largest));
    const float reference = highest == -INFINITY ? 0.0f : highest;
    *old = vf_exp2(vf_set1(st->highest[r] - reference))[0];
    st->highest[r] = highest;
    vf sum = vf_load(st->sums[r]) * *old, top = {0};
    for (int s = 0; s < tile->count; s++) {
        const vf weight = vf_exp2(vf_load(scores + s * SUBTILE) - reference);
        const vf product = weight * scales->v[s];
        sum += weight;
        top = vf_max(product, top);
        vf_store(scores + s * SUBTILE, product);
    }
    vf_store(st->sums[r], sum);
    const float most = vf_reduce_max(top);
    const int some = most > 1e-30f;
    *factor = some ? most / WEIGHT_MAX : 0.0f;
    const vf inverse = vf_set1(some ? WEIGHT_MAX / most : 0.0f);
    for (int s = 0; s < tile->count; s++) pack_weights(weights[s], vf_load(scores + s * SUBTILE) * inverse);
}

INLINE void attend_rows(State *st, int r0, const Tile *tile, Prefetch *prefetch, const Scales *scales,
                        int64_t step_bytes, const int rows)
{
    const int subtiles = KEY_SUBTILES(rows), vectors = VALUE_VECTORS(rows);
    _Alignas(64) float scores[MAX_TILE_ROWS][TILE_TOKENS];
    _Alignas(64) uint8_t weights[MAX_TILE_ROWS][TILE_SUBTILES][32];
    float old[MAX_TILE_ROWS], factor[MAX_TILE_ROWS];
    int s = 0;
    for (; s + subtiles <= tile->count; s += subtiles)
        key_products(st, r0, tile, prefetch, s, step_bytes, scores, rows, subtiles, 0, TERMS);
    if (subtiles > 1)
        for (; s < tile->count; s++) key_products(st, r0, tile, prefetch, s, step_bytes, scores, rows, 1, 0, TERMS);
    if (scales->refine)
        for (s = 0; s < tile->count; s++) key_products(st, r0, tile, prefetch, s, step_bytes, scores, rows, 1, TERMS, 1);
    for (int r = 0; r < rows; r++)
        weigh_row(st, r0 + r, tile, scales, scores[r], weights[r], &old[r], &factor[r]);
    const int64_t dim = st->v_head_dim;
    int64_t d = 0;
    for (; d + vectors * LANES <= dim; d += vectors * LANES)
        value_products(st, r0, tile, prefetch, d, weights, old, factor, rows, vectors, 0);
    for (; d + LANES <= dim; d += LANES) value_products(st, r0, tile, prefetch, d, weights, old, factor, rows, 1, 0);
    if (d < dim) value_products(st, r0, tile, prefetch, d, weights, old, factor, rows, 1, (int)(dim - d));
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
                     call->mask_start, call->mask_columns, head, begin, end};
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
        p[1] = st.fault[r] ? NAN : vf_reduce_sum(vf_load(st.sums[r]));
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
