/* Extend attention, included once per instruction set: a chunk of new rows over a past in int8 blocks, and causally over
 * the rows' own keys and values in full precision (DESIGN.md section 6).
 *
 * A work item takes a tile of query rows of one key/value head through its keys, 64 tokens at a time, with an online
 * softmax. The past comes first, in the conditioned domain; then the sums are rotated back once, and the first tokens
 * and the chunk follow in the model's own domain. Keys are centred in both. */
#include "extend_softmax.h"

INLINE int64_t row_position(const ExtendState *st, int r)
{
    return st->plan->call->rows.table.lengths[st->sequence] + (st->row + r) / st->plan->group;
}

/* Place of a query row in `q` or `out`, in elements. */
INLINE int64_t row_place(const ExtendState *st, int r, const int64_t *stride)
{
    const int64_t group = st->plan->group, row = st->row + r;
    return st->sequence * stride[0] + (st->head * group + row % group) * stride[1] + row / group * stride[2];
}

/* Load the query rows, rotated as the stored keys are or as they come. */
static void load_extend_queries(ExtendState *st, int rotate)
{
    const DecodeCall *call = &st->plan->call->rows;
    const Layer *layer = st->plan->layer;
    const int64_t dim = layer->head_dim;
    const int centered = layer->key_center && (call->softcap != 0 || call->sink_logits);
    float center[MAX_DIM] = {0};
    if (centered) memcpy(center, layer->key_center + st->head * dim, (size_t)dim * sizeof(float));
    st->any_faulty_query = 0;
    for (int r = 0; r < st->rows; r++) {
        float *q = st->q + r * padded(dim);
        int finite;
        load_row(q, (const char *)call->q + row_place(st, r, call->q_strides) * dtype_bytes(call->dtype), call->dtype, dim);
        largest_magnitude(q, dim, &finite);
        st->faulty_query[r] = !finite;
        st->any_faulty_query |= !finite;
        vf dot = {0};
        if (centered)
            for (int64_t d = 0; d < dim; d += 16) dot = vf_mul_add(vf_load(q + d), vf_load(center + d), dot);
        st->center_score[r] = vf_reduce_sum(dot) * st->factor;
        if (rotate) hadamard_row(q, dim);
    }
}

/* What the rows see of tokens [begin, end); of their own ones, causally. Returns the first position that any row sees,
 * or `end`, and in *stop where the last one ends. */
static int64_t set_ranges(ExtendState *st, int64_t begin, int64_t end, int causal, int64_t *stop)
{
    const DecodeCall *call = &st->plan->call->rows;
    if (call->kv_start) begin = max_i64(begin, call->kv_start[st->sequence]);
    st->latest_first = st->latest_last = INT64_MIN;
    st->earliest_first = st->earliest_last = INT64_MAX;
    for (int r = 0; r < st->rows; r++) {
        const int64_t position = row_position(st, r);
        st->first[r] = call->window ? max_i64(begin, position - call->window + 1) : begin;
        st->last[r] = causal ? min_i64(end, position + 1) : end;
        st->latest_first = max_i64(st->latest_first, st->first[r]);
        st->earliest_last = min_i64(st->earliest_last, st->last[r]);
        st->earliest_first = min_i64(st->earliest_first, st->first[r]);
        st->latest_last = max_i64(st->latest_last, st->last[r]);
    }
    int64_t from = st->earliest_first;
    *stop = st->latest_last;
    if (call->key_mask) {
        from = max_i64(from, call->mask_start);
        *stop = min_i64(*stop, call->mask_start + call->mask_columns);
    }
    return from;
}

/* All rows over the tile of keys and values at hand. */
static void extend_tile(ExtendState *st)
{
    const Layer *layer = st->plan->layer;
    const FloatTile *tile = &st->tile;
    const int64_t tokens = tile->count * SUBTILE, v_stride = padded(layer->v_head_dim);
    int plain = !st->any_faulty_query && !st->capped && tile->position[0] >= st->latest_first &&
                tile->position[tile->count - 1] + SUBTILE <= st->earliest_last;
    for (int s = 0; s < tile->count; s++) plain &= tile->admitted[s] == 0xffff && !tile->faulty[s];
    const Product scores = {.c = st->scores[0], .a = st->q, .b = tile->keys, .c_stride = TILE_TOKENS,
                            .a_stride = padded(layer->head_dim), .b_stride = TILE_TOKENS, .depth = layer->head_dim,
                            .columns = tokens};
    multiply(&scores, st->rows);
    softmax_rows(st, plain);
    const Product values = {.c = st->out, .a = st->scores[0], .b = tile->values, .old = st->old, .c_stride = v_stride,
                            .a_stride = TILE_TOKENS, .b_stride = v_stride, .depth = tokens, .columns = v_stride};
    multiply(&values, st->rows);
}

static Cursor cursor_of(const ExtendState *st, int64_t begin, int64_t end)
{
    const DecodeCall *call = &st->plan->call->rows;
    return (Cursor){st->plan->layer, call->table.ids + st->sequence * call->table.stride,
                    call->key_mask ? call->key_mask + st->sequence * call->mask_stride : NULL,
                    call->mask_start, call->mask_columns, st->head, begin, end,
                    begin / st->plan->layer->block_size, begin % st->plan->layer->block_size,
                    st->plan->layer->segments};
}

static void extend_over_blocks(ExtendState *st)
{
    const DecodeCall *call = &st->plan->call->rows;
    int64_t stop, begin = set_ranges(st, first_in_blocks(call, st->sequence), call->table.lengths[st->sequence], 0, &stop);
    if (begin >= stop) return;
    Cursor cursor = cursor_of(st, begin - begin % SUBTILE, stop);
    for (;;) {
        Tile tile;
        next_tile(&cursor, &tile);
        if (!tile.count) return;
        dequantize_tile(&st->tile, &tile, st->plan->layer, st->earliest_first, st->latest_last);
        extend_tile(st);
    }
}

/* Over rows in full precision, of which row i stands at position `start` + i; what the rows see has been set. */
static void extend_over_rows(ExtendState *st, const DenseRows *rows, int64_t start, int64_t begin, int64_t stop)
{
    FloatTile *tile = &st->tile;
    const Cursor cursor = cursor_of(st, begin, stop);
    begin = max_i64(begin, start);
    while (begin < stop) {
        int n = 0;
        for (; n < TILE_SUBTILES && begin < stop; begin += SUBTILE) {
            const int count = (int)min_i64(SUBTILE, stop - begin);
            const uint32_t there = (1u << count) - 1;
            tile->admitted[n] = cursor.mask ? admitted_tokens(&cursor, begin) & there : there;
            if (!tile->admitted[n]) continue;
            tile->position[n] = begin;
            load_dense_subtile(tile, n, rows, begin - start, count, st->plan->layer);
            n++;
        }
        tile->count = n;
        if (n) extend_tile(st);
    }
}

static void extend_over_first_tokens(ExtendState *st)
{
    const FirstTokens *held = &st->plan->call->rows.first_tokens;
    const Layer *layer = st->plan->layer;
    if (!held->k) return;
    const int64_t first = held->first[st->sequence], past = st->plan->call->rows.table.lengths[st->sequence];
    int64_t stop, begin = set_ranges(st, first, min_i64(held->stop[st->sequence], past), 0, &stop);
    const int64_t at = (held->row[st->sequence] * layer->num_kv_heads + st->head) * held->count;
    const int64_t bytes = dtype_bytes(held->dtype);
    const DenseRows rows = {(const char *)held->k + at * layer->head_dim * bytes,
                            (const char *)held->v + at * layer->v_head_dim * bytes, layer->head_dim, layer->v_head_dim,
                            held->dtype, layer->key_center ? layer->key_center + st->head * layer->head_dim : NULL};
    extend_over_rows(st, &rows, first, begin, stop);
}

static void extend_over_chunk(ExtendState *st)
{
    const ExtendCall *call = st->plan->call;
    const Layer *layer = st->plan->layer;
    const FirstTokens *held = &call->rows.first_tokens;
    const int64_t start = call->rows.table.lengths[st->sequence], bytes = dtype_bytes(call->rows.dtype);
    int64_t stop, lowest = start;
    /* Before the first tokens is padding, which nobody sees. */
    if (held->k) lowest = max_i64(lowest, min_i64(held->first[st->sequence], held->stop[st->sequence]));
    const int64_t begin = set_ranges(st, lowest, start + call->rows.q_len, 1, &stop);
    const int64_t *ks = call->k_strides, *vs = call->v_strides;
    const DenseRows rows = {(const char *)call->k_new + (st->sequence * ks[0] + st->head * ks[1]) * bytes,
                            (const char *)call->v_new + (st->sequence * vs[0] + st->head * vs[1]) * bytes, ks[2], vs[2],
                            call->rows.dtype, layer->key_center ? layer->key_center + st->head * layer->head_dim : NULL};
    extend_over_rows(st, &rows, start, begin, stop);
}

static void store_extend_row(ExtendState *st, int r)
{
    const DecodeCall *call = &st->plan->call->rows;
    const int64_t dim = st->plan->layer->v_head_dim, q_head = st->head * st->plan->group + (st->row + r) % st->plan->group;
    const float sink = call->sink_logits ? call->sink_logits[q_head] * LOG2_E : -INFINITY;
    const float highest = larger(sink, st->highest[r]), reference = highest == -INFINITY ? 0.0f : highest;
    const float weight = exp2f(st->highest[r] - reference);
    float total = 0;
    for (int lane = 0; lane < FLOAT_LANES; lane++) total += st->sums[r][lane];
    total = total * weight + (sink == sink ? exp2f(sink - reference) : sink);
    float *out = st->out + r * padded(dim);
    const vf inverse = vf_set1(st->fault[r] ? NAN : total == 0 ? 0.0f : weight / total);
    for (int64_t d = 0; d < dim; d += 16) vf_store(out + d, vf_load(out + d) * inverse);
    store_row((char *)call->out + row_place(st, r, call->out_strides) * dtype_bytes(call->dtype), out, call->dtype, dim);
}

/* Items numbered [sequence, kv head, tile of rows], the last rows of a chunk first: they see the most. */
static void extend_item(const ExtendPlan *plan, int64_t item)
{
    const Layer *layer = plan->layer;
    const DecodeCall *call = &plan->call->rows;
    const int64_t row_tile = plan->row_tiles - 1 - item % plan->row_tiles, unit = item / plan->row_tiles;
    ExtendState st;
    st.plan = plan;
    st.sequence = unit / layer->num_kv_heads;
    st.head = unit % layer->num_kv_heads;
    st.row = row_tile * plan->tile_rows;
    st.rows = (int)min_i64(plan->rows - st.row, plan->tile_rows);
    st.capped = call->softcap != 0;
    st.softcap = (float)call->softcap;
    st.factor = (float)call->scale * (st.capped ? 1.0f : LOG2_E);
    memset(st.out, 0, (size_t)(st.rows * padded(layer->v_head_dim)) * sizeof(float));
    memset(st.sums, 0, sizeof st.sums);
    memset(st.fault, 0, sizeof st.fault);
    for (int r = 0; r < EXTEND_ROWS; r++) st.highest[r] = st.largest[r] = -INFINITY;
    load_extend_queries(&st, layer->rotate != 0);
    extend_over_blocks(&st);
    if (layer->rotate) {
        for (int r = 0; r < st.rows; r++) hadamard_row(st.out + r * padded(layer->v_head_dim), layer->v_head_dim);
        load_extend_queries(&st, 0);
    }
    extend_over_first_tokens(&st);
    extend_over_chunk(&st);
    for (int r = 0; r < st.rows; r++) store_extend_row(&st, r);
}
