/* What a work item of decode attention carries from tile to tile: its query rows and their running softmax. */
#include "rows.h"
#include "vecn.h"

/* Subtiles (16 tokens each) whose softmax and value products are done together. */
enum { TILE_SUBTILES = 4, TILE_TOKENS = TILE_SUBTILES * SUBTILE };
/* q = step * (256 * high + low + rest / REST_STEPS), or with one 16-bit integer in place of high and low. */
enum { REST_STEPS = 254 };
static const float LOG2_E = 1.4426950408889634f;
/* Largest error in a score, in standard deviations, that is left to the two main terms of q alone. */
static const float SCORE_TOLERANCE = 8e-5f;

typedef struct {
    _Alignas(64) uint8_t q[ROW_BLOCK][TERMS + 1][MAX_DIM / 4 * TERM_BYTES]; /* main terms, rest */
    _Alignas(64) float out[ROW_BLOCK][MAX_DIM]; /* sum of weight * value so far */
    _Alignas(64) float sums[ROW_BLOCK][VECN_FLOATS]; /* of weights, lane by lane */
    float highest[ROW_BLOCK];                   /* score, in units of log2 */
    float factor[ROW_BLOCK];                    /* score = factor * k_scale * integer product */
    float center_score[ROW_BLOCK];              /* what key centring took from every score */
    int32_t offset[ROW_BLOCK][TERMS + 1];       /* undoes KEY_OFFSET */
    int64_t first[ROW_BLOCK], last[ROW_BLOCK];  /* the row sees tokens [first, last) */
    uint8_t faulty_query[ROW_BLOCK], fault[ROW_BLOCK];
    int rows, any_faulty_query, capped;
    int64_t latest_first, earliest_last; /* all rows see what lies between */
    int64_t earliest_first, latest_last; /* no row sees what lies outside */
    int64_t head_dim, v_head_dim;
    float softcap, error_per_scale; /* expected score error = error_per_scale * k_scale */
} State;

/* One subtile per entry: where it is, and which of its tokens key_mask admits. */
typedef struct {
    int count;
    int64_t position[TILE_SUBTILES];
    uint32_t admitted[TILE_SUBTILES];
    const int8_t *k[TILE_SUBTILES], *v[TILE_SUBTILES];
    const uint16_t *k_scales[TILE_SUBTILES], *v_scales[TILE_SUBTILES];
} Tile;

typedef struct {
    const Layer *layer;
    const int32_t *ids;
    const uint8_t *mask; /* of this sequence, or NULL */
    int64_t mask_start, mask_columns;
    int64_t head, position, end;
    int64_t column, slot; /* of the table, and in the block, where the position is */
    const Segment *segment; /* of the block before */
} Cursor;

static uint32_t admitted_tokens(const Cursor *c, int64_t position)
{
    const int64_t column = position - c->mask_start;
    uint32_t bits = 0;
    if (column >= 0 && column + SUBTILE <= c->mask_columns) {
        uint64_t half[2];
        memcpy(half, c->mask + column, 16);
        if (half[0] == 0x0101010101010101 && half[1] == half[0]) return 0xffff;
        if (!half[0] && !half[1]) return 0;
    }
    for (int i = 0; i < SUBTILE; i++)
        if (column + i >= 0 && column + i < c->mask_columns && c->mask[column + i]) bits |= 1u << i;
    return bits;
}

/* The next subtiles that anyone may see; holes and fully masked ones are passed over. */
static void next_tile(Cursor *c, Tile *tile)
{
    const Layer *layer = c->layer;
    const int64_t size = layer->block_size;
    int n = 0;
    for (; n < TILE_SUBTILES && c->position < c->end; c->position += SUBTILE) {
        const int64_t block = c->ids[c->column], slot = c->slot;
        c->slot = slot + SUBTILE == size ? 0 : slot + SUBTILE;
        c->column += c->slot == 0;
        if (block < 0) continue;
        const uint32_t admitted = c->mask ? admitted_tokens(c, c->position) : 0xffff;
        if (!admitted) continue;
        const Segment *segment = c->segment = segment_of(layer, c->segment, block);
        const int64_t at = slots_before(layer, segment, c->head, block);
        tile->position[n] = c->position;
        tile->admitted[n] = admitted;
        tile->k[n] = segment->k + at * layer->head_dim + slot * 4;
        tile->v[n] = segment->v + (at + slot) * layer->v_head_dim;
        tile->k_scales[n] = segment->k_scales + at + slot;
        tile->v_scales[n] = segment->v_scales + at + slot;
        __builtin_prefetch(tile->k_scales[n]);
        __builtin_prefetch(tile->v_scales[n]);
        n++;
    }
    tile->count = n;
}

/* Split a query row, conditioned as the keys were, into integer terms. */
static void split_query(State *st, int r, const float *q, float scale)
{
    int finite;
    const float largest = largest_magnitude(q, st->head_dim, &finite);
    const int sound = finite && largest > 1e-30f;
    const float step = sound ? largest / QUERY_MAX : 0.0f;
    st->faulty_query[r] = !finite;
    st->any_faulty_query |= !finite;
    st->factor[r] = step * scale * (st->capped ? 1.0f : LOG2_E);
    const float error = step * fabsf(scale) * 127 * sqrtf((float)st->head_dim) * 0.144f;
    if (error > st->error_per_scale) st->error_per_scale = error;
    int32_t whole[MAX_DIM], rest[MAX_DIM], sums[3] = {0};
    const vf zero = {0};
    for (int64_t d = 0; d < st->head_dim; d += 16) {
        const vf x = sound ? vf_load(q + d) / step : zero;
        const vf nearest = vf_round(x);
        const vm w = vf_to_int(nearest), e = vf_to_int(vf_round((x - nearest) * (float)REST_STEPS));
        memcpy(whole + d, &w, sizeof w);
        memcpy(rest + d, &e, sizeof e);
    }
    for (int64_t d = 0; d < st->head_dim; d++) {
        const int64_t at = d / 4 * TERM_BYTES;
#if TERMS == 2
        const int32_t high = (whole[d] + 128) >> 8, low = whole[d] - 256 * high;
        st->q[r][0][at + d % 4] = (uint8_t)high;
        st->q[r][1][at + d % 4] = (uint8_t)low;
        st->q[r][2][at + d % 4] = (uint8_t)rest[d];
        sums[0] += high, sums[1] += low, sums[2] += rest[d];
#else
        const int16_t wide[2] = {(int16_t)whole[d], (int16_t)rest[d]};
        memcpy(&st->q[r][0][at + 2 * WIDE_PLACE(d % 4)], &wide[0], 2);
        memcpy(&st->q[r][1][at + 2 * WIDE_PLACE(d % 4)], &wide[1], 2);
#endif
    }
    for (int t = 0; t <= TERMS; t++) st->offset[r][t] = -KEY_OFFSET * sums[t];
}

/* Load and condition the query rows of a row block, and find what each of them sees in [begin, end). */
static void load_queries(State *st, const DecodePlan *plan, int64_t sequence, int64_t head, int64_t row_block,
                         int64_t begin, int64_t end)
{
    const DecodeCall *call = plan->call;
    const Layer *layer = plan->layer;
    const int64_t length = call->table.lengths[sequence], *stride = call->q_strides;
    const float scale = (float)call->scale;
    st->rows = (int)min_i64(plan->rows - row_block * ROW_BLOCK, ROW_BLOCK);
    st->head_dim = layer->head_dim;
    st->v_head_dim = layer->v_head_dim;
    st->softcap = (float)call->softcap;
    st->capped = call->softcap != 0;
    st->any_faulty_query = 0;
    st->error_per_scale = 0;
    st->latest_first = st->latest_last = begin;
    st->earliest_first = st->earliest_last = end;
    for (int r = 0; r < st->rows; r++) {
        const int64_t row = row_block * ROW_BLOCK + r, i = row % call->q_len;
        const int64_t q_head = head * plan->group + row / call->q_len, position = length - call->q_len + i;
        float q[MAX_DIM];
        const int64_t at = sequence * stride[0] + q_head * stride[1] + i * stride[2];
        load_row(q, (const char *)call->q + at * dtype_bytes(call->dtype), call->dtype, st->head_dim);
        st->center_score[r] = 0;
        if (layer->key_center && (call->softcap != 0 || call->sink_logits)) {
            const float *center = layer->key_center + head * st->head_dim;
            float dot = 0;
            for (int64_t d = 0; d < st->head_dim; d++) dot += q[d] * center[d];
            st->center_score[r] = dot * scale * (st->capped ? 1.0f : LOG2_E);
        }
        if (layer->rotate) hadamard_row(q, st->head_dim);
        split_query(st, r, q, scale);
        int64_t first = max_i64(begin, first_in_blocks(call, sequence));
        if (call->window) first = max_i64(first, position - call->window + 1);
        st->first[r] = first;
        st->last[r] = min_i64(end, position + 1);
        st->latest_first = max_i64(st->latest_first, st->first[r]);
        st->earliest_last = min_i64(st->earliest_last, st->last[r]);
        st->earliest_first = min_i64(st->earliest_first, st->first[r]);
        st->latest_last = max_i64(st->latest_last, st->last[r]);
        st->highest[r] = -INFINITY;
        st->fault[r] = 0;
        memset(st->sums[r], 0, sizeof st->sums[r]);
        memset(st->out[r], 0, (size_t)padded(st->v_head_dim) * sizeof(float));
    }
}
