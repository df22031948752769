/* First tokens in full precision: they join where the splits do, in the model's own domain. */
#include "decode_softmax.h"

/* A row of first token i of a sequence, as floats. */
static void load_first_row(float *row, const DecodePlan *plan, int64_t sequence, int64_t head, int64_t i, int values)
{
    const FirstTokens *tokens = &plan->call->first_tokens;
    const int64_t dim = values ? plan->layer->v_head_dim : plan->layer->head_dim;
    const int64_t at = ((tokens->row[sequence] * plan->layer->num_kv_heads + head) * tokens->count + i) * dim;
    load_row(row, (const char *)(values ? tokens->v : tokens->k) + at * dtype_bytes(tokens->dtype), tokens->dtype, dim);
}

static int sees_first_token(const DecodeCall *call, int64_t sequence, int64_t row, int64_t position)
{
    const int64_t own = call->table.lengths[sequence] - call->q_len + row % call->q_len;
    const int64_t column = position - call->mask_start;
    if (position >= call->first_tokens.stop[sequence] || position > own) return 0;
    if (call->kv_start && position < call->kv_start[sequence]) return 0;
    if (call->window && position <= own - call->window) return 0;
    if (!call->key_mask) return 1;
    return column >= 0 && column < call->mask_columns && call->key_mask[sequence * call->mask_stride + column];
}

/* Scores of a query row with the first tokens, in units of log2, to be compared with those of the blocks: -INFINITY
 * where the row does not see the token, NaN where it sees a fault. Returns how many there are. */
static int64_t first_scores(const DecodePlan *plan, int64_t sequence, int64_t head, int64_t row, float *scores)
{
    const DecodeCall *call = plan->call;
    const Layer *layer = plan->layer;
    if (!call->first_tokens.k) return 0;
    const int64_t dim = layer->head_dim, *stride = call->q_strides;
    const int64_t at = sequence * stride[0] + (head * plan->group + row / call->q_len) * stride[1] +
                       row % call->q_len * stride[2];
    float q[MAX_DIM], k[MAX_DIM], v[MAX_DIM];
    load_row(q, (const char *)call->q + at * dtype_bytes(call->dtype), call->dtype, dim);
    for (int64_t i = 0; i < call->first_tokens.count; i++) {
        scores[i] = -INFINITY;
        if (!sees_first_token(call, sequence, row, call->first_tokens.first[sequence] + i)) continue;
        load_first_row(k, plan, sequence, head, i, 0);
        load_first_row(v, plan, sequence, head, i, 1);
        int finite_key, finite_value;
        largest_magnitude(k, dim, &finite_key);
        largest_magnitude(v, layer->v_head_dim, &finite_value);
        /* Where scores are only compared, those of the blocks lack the centre's part. */
        if (layer->key_center && !call->softcap && !call->sink_logits)
            for (int64_t d = 0; d < dim; d++) k[d] -= layer->key_center[head * dim + d];
        vf sum = {0};
        for (int64_t d = 0; d < dim; d += 16) sum += vf_load(q + d) * vf_load(k + d);
        float score = vf_reduce_sum(sum) * (float)call->scale;
        if (call->softcap) score = (float)call->softcap * tanhf(score / (float)call->softcap);
        scores[i] = finite_key && finite_value ? score * LOG2_E : NAN;
    }
    return call->first_tokens.count;
}
