/* What Python calls: argument checks, choice of the instruction set, sharing the work among torch's threads. */
#include "int8_paged.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

typedef void (*RangeFunction)(int64_t begin, int64_t end, void *context);
static int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void *context);
static int32_t (*thread_count)(uint32_t *count);

/* Best first. */
static const Kernels *const all_kernels[] = {
#if defined(__x86_64__)
    &int8_paged_avx512vnni,
    &int8_paged_avxvnni,
    &int8_paged_avx2,
#elif defined(__aarch64__)
    &int8_paged_neon,
#endif
    &int8_paged_portable,
};
enum { KERNEL_SETS = sizeof all_kernels / sizeof all_kernels[0] };
static const Kernels *kernels;

/* torch_parallel_for and torch_get_num_threads of libtorch, or NULL: then one thread does everything. */
INT8_PAGED_EXPORT void int8_paged_set_threads(void *parallel_for_address, void *thread_count_address)
{
    memcpy(&parallel_for, &parallel_for_address, sizeof parallel_for);
    memcpy(&thread_count, &thread_count_address, sizeof thread_count);
}

/* sizeof the i-th struct that Python fills, or 0: Python compares them with what it packs. */
INT8_PAGED_EXPORT int64_t int8_paged_record_size(int64_t i)
{
    static const int64_t sizes[] = {sizeof(Layer), sizeof(Segment), sizeof(AppendCall), sizeof(DecodeCall),
                                    sizeof(FirstTokens), sizeof(GatherCall), sizeof(ExtendCall)};
    return i >= 0 && i < (int64_t)(sizeof sizes / sizeof *sizes) ? sizes[i] : 0;
}

/* Name of the i-th instruction set that this processor has, best first, or NULL. */
INT8_PAGED_EXPORT const char *int8_paged_isa(int64_t i)
{
    for (int k = 0; k < KERNEL_SETS; k++)
        if (all_kernels[k]->supported() && i-- == 0) return all_kernels[k]->name;
    return NULL;
}

/* 1 if the processor has the instruction set of this name, which is used from now on. */
INT8_PAGED_EXPORT int64_t int8_paged_select_isa(const char *name)
{
    for (int k = 0; k < KERNEL_SETS; k++)
        if (!strcmp(all_kernels[k]->name, name) && all_kernels[k]->supported()) {
            kernels = all_kernels[k];
            return 1;
        }
    return 0;
}

/* Threads worth waking for work that takes one thread about `nanoseconds`. */
static int64_t useful_threads(int64_t nanoseconds)
{
    enum { NANOSECONDS_PER_THREAD = 4000 };
    uint32_t threads = 1;
    if (!parallel_for || !thread_count || nanoseconds < 2 * NANOSECONDS_PER_THREAD || thread_count(&threads)) return 1;
    return min_i64(threads, nanoseconds / NANOSECONDS_PER_THREAD);
}

/* Work items 0..count, handed out a few at a time to whichever thread is free. */
typedef struct {
    void (*run)(void *job, int64_t begin, int64_t end);
    void *job;
    int64_t count, batch;
    _Atomic int64_t next;
} Queue;

static void drain(int64_t begin, int64_t end, void *context)
{
    (void)begin, (void)end;
    Queue *queue = context;
    for (;;) {
        const int64_t item = atomic_fetch_add_explicit(&queue->next, queue->batch, memory_order_relaxed);
        if (item >= queue->count) return;
        queue->run(queue->job, item, min_i64(item + queue->batch, queue->count));
    }
}

static void run_items(void (*run)(void *, int64_t, int64_t), void *job, int64_t count, int64_t threads)
{
    if (threads <= 1 || count <= 1) {
        run(job, 0, count);
        return;
    }
    Queue queue = {run, job, count, max_i64(1, count / (8 * threads)), 0};
    if (parallel_for(0, threads, 1, drain, &queue)) drain(0, 1, &queue);
}

static int check_blocks(const Table *table, int64_t sequence, int64_t first, int64_t last, int64_t num_blocks)
{
    const int32_t *ids = table->ids + sequence * table->stride;
    int32_t highest = -1;
    for (int64_t i = first; i < last; i++) highest = ids[i] > highest ? ids[i] : highest;
    return highest < num_blocks ? OK : BAD_BLOCK;
}

typedef struct {
    const Layer *layer;
    const void *call;
} Job;

static void run_append(void *job, int64_t begin, int64_t end)
{
    const Job *j = job;
    kernels->append_rows(j->layer, j->call, begin, end);
}

INT8_PAGED_EXPORT int64_t int8_paged_append(const Layer *layer, const AppendCall *call)
{
    const Table *table = &call->table;
    const int64_t size = layer->block_size, capacity = table->max_blocks * size;
    for (int64_t b = 0; b < call->batch; b++) {
        const int64_t before = table->lengths[b], after = before + call->tokens;
        if (before < 0 || after > capacity) return BAD_LENGTH;
        if (check_blocks(table, b, before / size, ceil_div(after, size), layer->num_blocks)) return BAD_BLOCK;
    }
    const int64_t rows = call->batch * layer->num_kv_heads * call->tokens;
    Job job = {layer, call};
    run_items(run_append, &job, rows, useful_threads(rows * (layer->head_dim + layer->v_head_dim)));
    return OK;
}

static void run_decode(void *job, int64_t begin, int64_t end)
{
    for (int64_t item = begin; item < end; item++) kernels->decode_item(job, item);
}

/* Whether rows and places of the first tokens lie where there are some. */
static int check_first_tokens(const FirstTokens *tokens, int64_t batch)
{
    if (!tokens->k) return OK;
    if (tokens->count < 1 || tokens->count > MAX_FIRST_TOKENS) return BAD_FIRST_TOKEN;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t row = tokens->row[b], first = tokens->first[b], stop = tokens->stop[b];
        if (row < 0 || row >= tokens->rows || first < 0 || stop > first + tokens->count) return BAD_FIRST_TOKEN;
    }
    return OK;
}

/* Checks what the query rows of a call are and see, and bounds its window and mask. The first row stands `before`
 * tokens before the end of what the blocks hold. *tokens: what the rows see in the blocks, of all sequences; *longest:
 * of one. */
static int64_t check_rows(const Layer *layer, DecodeCall *call, int64_t before, int64_t *tokens, int64_t *longest)
{
    /* Positions lie far below 2^62: a window or a mask that starts farther away is the same, and sums cannot overflow. */
    const int64_t far = INT64_MAX / 4, size = layer->block_size;
    const Table *table = &call->table;
    if (call->window < 0 || call->mask_columns < 0 || call->mask_columns > far || call->q_len < 1 ||
        call->num_q_heads < 1 || call->num_q_heads % layer->num_kv_heads)
        return BAD_RANGE;
    call->window = min_i64(call->window, far);
    call->mask_start = max_i64(min_i64(call->mask_start, far), -far);
    if (check_first_tokens(&call->first_tokens, call->batch)) return BAD_FIRST_TOKEN;
    *tokens = *longest = 0;
    for (int64_t b = 0; b < call->batch; b++) {
        if (table->lengths[b] < 0 || table->lengths[b] > table->max_blocks * size) return BAD_LENGTH;
        int64_t begin, end;
        visible_range(call, b, table->lengths[b] - before, &begin, &end);
        if (check_blocks(table, b, begin / size, ceil_div(end, size), layer->num_blocks)) return BAD_BLOCK;
        *tokens += end - begin;
        *longest = max_i64(*longest, end - begin);
    }
    return OK;
}

INT8_PAGED_EXPORT int64_t int8_paged_decode(const Layer *layer, const DecodeCall *given)
{
    enum { ITEMS_PER_THREAD = 4, LEAST_SPLIT = 256 };
    DecodeCall within = *given;
    const DecodeCall *call = &within;
    int64_t tokens, longest;
    const int64_t error = check_rows(layer, &within, call->q_len, &tokens, &longest);
    if (error) return error;
    const int64_t group = call->num_q_heads / layer->num_kv_heads, rows = group * call->q_len;
    const int64_t row_blocks = ceil_div(rows, ROW_BLOCK), units = call->batch * layer->num_kv_heads * row_blocks;
    const int64_t dims = layer->head_dim + layer->v_head_dim;
    const int64_t threads = useful_threads(tokens * layer->num_kv_heads * dims * (2 + rows) / 64);
    int64_t splits = 1, split_tokens = max_i64(longest, 1);
    if (threads > 1 && units < ITEMS_PER_THREAD * threads) {
        const int64_t target = tokens * layer->num_kv_heads * row_blocks / (ITEMS_PER_THREAD * threads);
        splits = ceil_div(longest, max_i64(LEAST_SPLIT, target));
        while (splits > 1 && units * splits % threads) splits++; /* the same number of items for every thread */
        split_tokens = max_i64(64, (ceil_div(longest, max_i64(splits, 1)) + 63) & ~(int64_t)63);
        splits = max_i64(1, ceil_div(longest, split_tokens));
    }
    DecodePlan plan = {.layer = layer, .call = call, .group = group, .rows = rows, .row_blocks = row_blocks,
                       .splits = splits, .split_tokens = split_tokens, .partial_rows = min_i64(rows, ROW_BLOCK),
                       .partial_floats = PARTIAL_HEAD + layer->v_head_dim};
    if (splits > 1) {
        const int64_t floats = units * splits * plan.partial_rows * plan.partial_floats;
        plan.partials = malloc((size_t)floats * sizeof(float) + (size_t)units * sizeof(int32_t));
        if (!plan.partials) return NO_MEMORY;
        plan.pending = (int32_t *)(plan.partials + floats);
        for (int64_t i = 0; i < units; i++) plan.pending[i] = (int32_t)splits;
    }
    run_items(run_decode, &plan, units * splits, threads);
    free(plan.partials);
    return OK;
}

static void run_extend(void *job, int64_t begin, int64_t end)
{
    for (int64_t item = begin; item < end; item++) kernels->extend_item(job, item);
}

INT8_PAGED_EXPORT int64_t int8_paged_extend(const Layer *layer, const ExtendCall *given)
{
    enum { ITEMS_PER_THREAD = 2, LEAST_ROWS = 16 };
    ExtendCall within = *given;
    const DecodeCall *rows = &within.rows;
    int64_t tokens, longest;
    const int64_t error = check_rows(layer, &within.rows, 0, &tokens, &longest);
    if (error) return error;
    const int64_t group = rows->num_q_heads / layer->num_kv_heads, count = group * rows->q_len;
    const int64_t units = rows->batch * layer->num_kv_heads, dims = layer->head_dim + layer->v_head_dim;
    const int64_t seen = tokens + rows->batch * ceil_div(rows->q_len, 2);
    const int64_t threads = useful_threads(seen * layer->num_kv_heads * count * dims / 64);
    /* Many rows share what a tile of keys costs, but every thread should have some. */
    int64_t tile = min_i64(count, EXTEND_ROWS);
    while (threads > 1 && tile > LEAST_ROWS && units * ceil_div(count, tile) < ITEMS_PER_THREAD * threads)
        tile = max_i64(LEAST_ROWS, ceil_div(tile, 2));
    ExtendPlan plan = {.layer = layer, .call = &within, .group = group, .rows = count, .tile_rows = tile,
                       .row_tiles = ceil_div(count, tile)};
    run_items(run_extend, &plan, units * plan.row_tiles, threads);
    return OK;
}

static void run_gather(void *job, int64_t begin, int64_t end)
{
    const Job *j = job;
    kernels->gather_blocks(j->layer, j->call, begin, end);
}

INT8_PAGED_EXPORT int64_t int8_paged_gather(const Layer *layer, const GatherCall *call)
{
    const int64_t size = layer->block_size, capacity = call->table.max_blocks * size;
    if (call->start < 0 || call->stop < call->start || call->stop > capacity) return BAD_RANGE;
    const int64_t first = call->start / size, blocks = ceil_div(call->stop, size) - first;
    for (int64_t b = 0; b < call->batch; b++) {
        const int64_t length = call->table.lengths[b];
        if (length < 0 || length > capacity) return BAD_LENGTH;
        if (check_blocks(&call->table, b, first, first + blocks, layer->num_blocks)) return BAD_BLOCK;
    }
    if (call->stop == call->start) return OK;
    const int64_t items = call->batch * layer->num_kv_heads * blocks;
    Job job = {layer, call};
    run_items(run_gather, &job, items, useful_threads(items * size * (layer->head_dim + layer->v_head_dim)));
    return OK;
}

/* Block dst[i] becomes block src[i], all heads. */
INT8_PAGED_EXPORT int64_t int8_paged_copy(const Layer *layer, const int32_t *src, const int32_t *dst, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (src[i] < 0 || src[i] >= layer->num_blocks || dst[i] < 0 || dst[i] >= layer->num_blocks) return BAD_BLOCK;
    for (int64_t head = 0; head < layer->num_kv_heads; head++)
        for (int64_t i = 0; i < count; i++) {
            if (src[i] == dst[i]) continue;
            const Segment *a = segment_of(layer, layer->segments, src[i]), *b = segment_of(layer, layer->segments, dst[i]);
            const int64_t from = slots_before(layer, a, head, src[i]), to = slots_before(layer, b, head, dst[i]);
            const int64_t size = layer->block_size;
            memcpy(b->k + to * layer->head_dim, a->k + from * layer->head_dim, (size_t)(size * layer->head_dim));
            memcpy(b->v + to * layer->v_head_dim, a->v + from * layer->v_head_dim, (size_t)(size * layer->v_head_dim));
            memcpy(b->k_scales + to, a->k_scales + from, (size_t)size * sizeof(uint16_t));
            memcpy(b->v_scales + to, a->v_scales + from, (size_t)size * sizeof(uint16_t));
        }
    return OK;
}

/* Orthonormal Hadamard transform of float32 rows, contiguous; see ../../conditioning.py. */
INT8_PAGED_EXPORT void int8_paged_hadamard(float *out, const float *x, int64_t rows, int64_t dim)
{
    kernels->hadamard_rows(out, x, rows, dim);
}
