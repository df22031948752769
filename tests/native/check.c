/* Checks every instruction set of this processor without Python: append and gather against the portable one, bit by
 * bit; decode, and extend with new rows in full precision, against attention in double precision over the gathered
 * rows. Unused slots are poisoned.
 * For processors that can only be emulated here; the Python tests say more, and test the portable one. With -DTHREADS,
 * for ThreadSanitizer: several callers at once, each of whose calls is shared among threads. */
#include "int8_paged.h"
#include "threads.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void int8_paged_set_threads(void *, void *);
const char *int8_paged_isa(int64_t);
int64_t int8_paged_select_isa(const char *);
int64_t int8_paged_append(const Layer *, const AppendCall *);
int64_t int8_paged_decode(const Layer *, const DecodeCall *);
int64_t int8_paged_extend(const Layer *, const ExtendCall *);
int64_t int8_paged_gather(const Layer *, const GatherCall *);

enum { CHUNK = 23 }; /* new rows of an extend call */

typedef struct {
    int64_t heads, group, head_dim, v_head_dim, block_size, q_len, length, window;
    double softcap;
    int rotate, center, mask, sink_logits, start, first_tokens;
} Shape;

static const Shape shapes[] = {
    {1, 1, 64, 64, 16, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0},
    {3, 3, 64, 64, 16, 1, 70, 0, 0, 1, 0, 0, 0, 0, 0},
    {2, 4, 128, 128, 16, 1, 333, 0, 0, 1, 1, 0, 0, 0, 0},
    {1, 8, 96, 40, 32, 1, 200, 0, 0, 0, 0, 0, 0, 0, 0},
    {2, 2, 80, 96, 48, 3, 131, 50, 0, 1, 0, 1, 0, 0, 0},
    {1, 7, 256, 36, 16, 2, 90, 0, 5, 0, 1, 0, 1, 9, 0},
    {1, 16, 32, 32, 16, 16, 51, 0, 0, 1, 0, 0, 0, 0, 0},
    {2, 1, 64, 64, 16, 1, 3001, 0, 0, 1, 0, 0, 0, 0, 0},
    {1, 5, 64, 128, 64, 2, 1500, 1, 0, 0, 0, 0, 1, 0, 0},
    {2, 3, 36, 4, 16, 1, 100, 33, 2, 1, 1, 1, 1, 20, 0},
    {3, 3, 64, 64, 16, 1, 70, 0, 0, 1, 1, 0, 0, 0, 1},
    {2, 3, 36, 40, 16, 3, 100, 0, 2, 1, 1, 1, 1, 2, 5},
    {1, 4, 256, 96, 32, 2, 1500, 1499, 0, 1, 1, 0, 0, 0, 16},
};

static _Thread_local uint64_t state = 88172645463325252u;
static double uniform(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}
static float normal(void) { return (float)(sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform())); }
static float *normals(int64_t n)
{
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = normal();
    return x;
}

/* Three threads, one after the other: the context is split, and the parts are joined. */
static int32_t serial_for(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void *), void *context)
{
    (void)grain;
    for (int64_t i = begin; i < end; i++) run(i, i + 1, context);
    return 0;
}

static int32_t three(uint32_t *count) { return *count = 3, 0; }

/* A layer with its blocks in one segment or in two. */
static Layer *make_layer(const Shape *s, int64_t blocks, const float *center, int64_t segments)
{
    Layer *layer = malloc(sizeof *layer + (size_t)segments * sizeof(Segment));
    *layer = (Layer){s->center ? center : NULL, s->heads, blocks, s->block_size, s->head_dim, s->v_head_dim, s->rotate, segments};
    for (int64_t i = 0, first = 0; i < segments; i++) {
        const int64_t last = i == segments - 1 ? blocks : blocks / 3, slots = s->heads * (last - first) * s->block_size;
        Segment *segment = &layer->segments[i];
        *segment = (Segment){malloc((size_t)(slots * s->head_dim)), malloc((size_t)(slots * s->v_head_dim)),
                             malloc((size_t)slots * 2), malloc((size_t)slots * 2), first, last - first};
        memset(segment->k, 127, (size_t)(slots * s->head_dim));
        memset(segment->v, 127, (size_t)(slots * s->v_head_dim));
        for (int64_t j = 0; j < slots; j++) segment->k_scales[j] = segment->v_scales[j] = 0x7e00;
        first = last;
    }
    return layer;
}

static void free_layer(Layer *layer)
{
    for (int64_t i = 0; i < layer->num_segments; i++) {
        const Segment *segment = &layer->segments[i];
        free(segment->k), free(segment->v), free(segment->k_scales), free(segment->v_scales);
    }
    free(layer);
}

static int same_bits(const Layer *a, const Layer *b)
{
    const size_t size = (size_t)a->block_size;
    for (int64_t head = 0; head < a->num_kv_heads; head++)
        for (int64_t block = 0; block < a->num_blocks; block++) {
            const Segment *s = segment_of(a, a->segments, block), *t = segment_of(b, b->segments, block);
            const int64_t i = slots_before(a, s, head, block), j = slots_before(b, t, head, block);
            if (memcmp(s->k + i * a->head_dim, t->k + j * a->head_dim, size * (size_t)a->head_dim) ||
                memcmp(s->v + i * a->v_head_dim, t->v + j * a->v_head_dim, size * (size_t)a->v_head_dim) ||
                memcmp(s->k_scales + i, t->k_scales + j, size * 2) || memcmp(s->v_scales + i, t->v_scales + j, size * 2))
                return 0;
        }
    return 1;
}

/* The first tokens as they are: their rows [heads, count, dim], and in the dense copy; what the blocks hold of them is
 * poisoned. */
static float *keep_first(const Shape *s, const float *x, float *dense, int64_t dim)
{
    float *rows = malloc((size_t)(s->heads * s->first_tokens * dim + 1) * sizeof *rows);
    for (int64_t head = 0; head < s->heads; head++)
        for (int64_t i = 0; i < s->first_tokens * dim; i++)
            rows[head * s->first_tokens * dim + i] = dense[head * s->length * dim + i] = x[head * s->length * dim + i];
    return rows;
}

/* Largest error of `out`, in units of the largest |v|. */
static double error_of(const Shape *s, const DecodeCall *call, const float *k, const float *v, const float *q, const float *out)
{
    double worst = 0, *scores = malloc((size_t)s->length * sizeof *scores);
    float largest = 0;
    for (int64_t i = 0; i < s->heads * s->length * s->v_head_dim; i++) largest = fmaxf(largest, fabsf(v[i]));
    for (int64_t row = 0; row < s->heads * s->group * s->q_len; row++) {
        const int64_t h = row / s->q_len, head = h / s->group, p = s->length - s->q_len + row % s->q_len;
        const double sink = s->sink_logits ? call->sink_logits[h] : -INFINITY;
        double highest = sink, total = 0;
        for (int64_t j = 0; j < s->length; j++) {
            const int seen = j <= p && j >= s->start && (!s->window || j > p - s->window) && (!s->mask || call->key_mask[j]);
            double dot = 0;
            for (int64_t d = 0; d < s->head_dim; d++)
                dot += (double)q[row * s->head_dim + d] * k[(head * s->length + j) * s->head_dim + d];
            dot *= call->scale;
            if (s->softcap) dot = s->softcap * tanh(dot / s->softcap);
            scores[j] = seen ? dot : -INFINITY;
            highest = fmax(highest, scores[j]);
        }
        if (highest == -INFINITY) highest = 0;
        for (int64_t j = 0; j < s->length; j++) total += scores[j] = exp(scores[j] - highest);
        total += exp(sink - highest);
        for (int64_t d = 0; d < s->v_head_dim; d++) {
            double sum = 0;
            for (int64_t j = 0; j < s->length; j++) sum += scores[j] * v[(head * s->length + j) * s->v_head_dim + d];
            const double error = fabs(out[row * s->v_head_dim + d] - (total > 0 ? sum / total : 0)) / largest;
            if (!(error <= worst)) worst = error; /* NaN too */
        }
    }
    free(scores);
    return worst;
}

/* [heads, length + CHUNK, dim]: the rows of `past`, and after them those of `new`. */
static float *joined(const Shape *s, const float *past, const float *new, int64_t dim)
{
    const int64_t old_row = s->length * dim, new_row = CHUNK * dim;
    float *all = malloc((size_t)(s->heads * (old_row + new_row)) * sizeof *all);
    for (int64_t head = 0; head < s->heads; head++) {
        memcpy(all + head * (old_row + new_row), past + head * old_row, (size_t)old_row * sizeof *all);
        memcpy(all + head * (old_row + new_row) + old_row, new + head * new_row, (size_t)new_row * sizeof *all);
    }
    return all;
}

/* Error of CHUNK new rows after the tokens of a decode call, whose keys and values are given as the kernels read them. */
static double extend_error(const Shape *s, const Layer *layer, const DecodeCall *decode, const float *k, const float *v)
{
    Shape after = *s;
    after.length += CHUNK, after.q_len = CHUNK;
    const int64_t rows = s->heads * s->group * CHUNK;
    float *q = normals(rows * s->head_dim), *out = normals(rows * s->v_head_dim);
    float *k_new = normals(s->heads * CHUNK * s->head_dim), *v_new = normals(s->heads * CHUNK * s->v_head_dim);
    float *k_all = joined(s, k, k_new, s->head_dim), *v_all = joined(s, v, v_new, s->v_head_dim);
    ExtendCall call = {*decode, k_new, v_new,
                       {0, CHUNK * s->head_dim, s->head_dim}, {0, CHUNK * s->v_head_dim, s->v_head_dim}};
    call.rows.out = out, call.rows.q = q, call.rows.q_len = CHUNK, call.rows.mask_columns += CHUNK;
    call.rows.q_strides[1] = CHUNK * s->head_dim, call.rows.out_strides[1] = CHUNK * s->v_head_dim;
    const int64_t code = int8_paged_extend(layer, &call);
    const double error = code == OK ? error_of(&after, &call.rows, k_all, v_all, q, out) : INFINITY;
    void *all[] = {q, out, k_new, v_new, k_all, v_all};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    return error;
}

/* Of several callers at once none may choose the instruction set. */
static int check(const Shape *s, const char *isa, int alone)
{
    const int64_t used = ceil_div(s->length, s->block_size), blocks = used + 2;
    int32_t *ids = malloc((size_t)used * sizeof *ids), zero = 0, length = (int32_t)s->length, start = s->start;
    for (int64_t i = 0; i < used; i++) ids[i] = (int32_t)((i * 7 + 3) % blocks); /* distinct unless 7 divides blocks */
    if (blocks % 7 == 0)
        for (int64_t i = 0; i < used; i++) ids[i] = (int32_t)(blocks - 1 - i);
    float *center = normals(s->heads * s->head_dim), *sink_logits = normals(s->heads * s->group);
    float *k = normals(s->heads * s->length * s->head_dim), *v = normals(s->heads * s->length * s->v_head_dim);
    float *q = normals(s->heads * s->group * s->q_len * s->head_dim);
    float *out = normals(s->heads * s->group * s->q_len * s->v_head_dim);
    float *k_dense = normals(s->heads * s->length * s->head_dim), *v_dense = normals(s->heads * s->length * s->v_head_dim);
    uint8_t *mask = malloc((size_t)(s->length + CHUNK));
    for (int64_t j = 0; j < s->length + CHUNK; j++) mask[j] = uniform() < 0.7;
    const Table before = {ids, used, used, &zero}, after = {ids, used, used, &length};
    const AppendCall append = {k, v,
                               {0, s->length * s->head_dim, s->head_dim},
                               {0, s->length * s->v_head_dim, s->v_head_dim},
                               DTYPE_FLOAT32, 1, s->length, before};
    const GatherCall gather = {k_dense, v_dense, DTYPE_FLOAT32, 1, 0, s->length, after};
    DecodeCall decode = {out, q,
                               {0, s->q_len * s->v_head_dim, s->v_head_dim},
                               {0, s->q_len * s->head_dim, s->head_dim},
                               DTYPE_FLOAT32, 1, s->heads * s->group, s->q_len, after, 1 / sqrt((double)s->head_dim),
                               s->start ? &start : NULL, s->mask ? mask : NULL, s->length, s->length, 0, s->window,
                               s->softcap, s->sink_logits ? sink_logits : NULL};
    Layer *layer = make_layer(s, blocks, center, 2), *portable = make_layer(s, blocks, center, 1);
    int failed = 0;
    if (alone) int8_paged_select_isa("portable");
    failed |= int8_paged_append(portable, &append) != OK;
    failed |= int8_paged_gather(portable, &gather) != OK;
    if (alone) int8_paged_select_isa(isa);
    failed |= int8_paged_append(layer, &append) != OK || !same_bits(layer, portable);
    const int32_t none = 0, kept = s->first_tokens;
    float *k_first = keep_first(s, k, k_dense, s->head_dim), *v_first = keep_first(s, v, v_dense, s->v_head_dim);
    if (kept) decode.first_tokens = (FirstTokens){k_first, v_first, &none, &none, &kept, 1, kept, DTYPE_FLOAT32};
    for (int64_t j = 0; j < kept * s->heads; j++) {
        const int64_t head = j / kept, slot = j % kept;
        const Segment *segment = segment_of(layer, layer->segments, ids[0]);
        segment->k_scales[slots_before(layer, segment, head, ids[0]) + slot] = 0x7e00;
        segment->v_scales[slots_before(layer, segment, head, ids[0]) + slot] = 0x7e00;
    }
    failed |= int8_paged_decode(layer, &decode) != OK;
    const double error = error_of(s, &decode, k_dense, v_dense, q, out);
    const double extended = extend_error(s, layer, &decode, k_dense, v_dense);
    failed |= !(error <= 1e-4) || !(extended <= 1e-5); /* extend has no integers in place of q and weights */
    printf("%-10s heads %ld group %ld dims %ld/%ld block %ld q_len %ld length %-4ld error %.1e, extend %.1e %s\n", isa, (long)s->heads,
           (long)s->group, (long)s->head_dim, (long)s->v_head_dim, (long)s->block_size, (long)s->q_len, (long)s->length,
           error, extended, failed ? "FAILED" : "ok");
    void *all[] = {k_first, v_first, ids, center, sink_logits, k, v, q, out, k_dense, v_dense, mask};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free_layer(layer), free_layer(portable);
    return failed;
}

static void *check_all(void *isa)
{
    int failed = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) failed |= check(&shapes[s], isa, 0);
    return failed ? isa : NULL;
}

/* Four callers of one instruction set at once. */
static int check_together(const char *isa)
{
    pthread_t callers[4];
    int failed = !int8_paged_select_isa(isa);
    for (int i = 0; i < 4; i++)
        if (pthread_create(&callers[i], NULL, check_all, (void *)isa)) abort();
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(callers[i], &result);
        failed |= result != NULL;
    }
    return failed;
}

/* Arguments: instruction sets that must be here. */
int main(int count, char **names)
{
    int failed = 0;
    void *address[2];
    int32_t (*run)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *) = serial_for;
    int together = 0;
#ifdef THREADS
    run = threaded_for, together = 1;
#endif
    int32_t (*threads)(uint32_t *) = three;
    memcpy(&address[0], &run, sizeof run);
    memcpy(&address[1], &threads, sizeof threads);
    int8_paged_set_threads(address[0], address[1]);
    for (int i = 1; i < count; i++)
        if (!int8_paged_select_isa(names[i])) failed = 1, printf("%s is not here\n", names[i]);
    const char *isa;
    for (int64_t i = 0; (isa = int8_paged_isa(i)); i++) {
        if (together) failed |= check_together(isa);
        for (size_t s = 0; !together && s < sizeof shapes / sizeof *shapes; s++) failed |= check(&shapes[s], isa, 1);
    }
    return failed;
}
