/* Carries out the calls of neon_proxy.c on the C library that it is linked with, in another process than the tests and
 * under an emulator. Argument: the tests' process.
 *
 * The kernels' memory is the tests' own, page by page: an address of theirs is mapped here with one bit changed, so that
 * it collides with nothing of the emulator's; the first touch of a page fetches it, and after the call the bytes that
 * have changed are written back. Bytes that have not changed are left alone, as other threads of the tests may be
 * writing beside them. */
#define _GNU_SOURCE
#include "neon_call.h"

#include "int8_paged.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

void int8_paged_set_threads(void *, void *);
const char *int8_paged_isa(int64_t);
int64_t int8_paged_select_isa(const char *);
int64_t int8_paged_append(const Layer *, const AppendCall *);
int64_t int8_paged_decode(const Layer *, const DecodeCall *);
int64_t int8_paged_extend(const Layer *, const ExtendCall *);
int64_t int8_paged_gather(const Layer *, const GatherCall *);
int64_t int8_paged_copy(const Layer *, const int32_t *, const int32_t *, int64_t);
void int8_paged_hadamard(float *, const float *, int64_t, int64_t);

enum { PAGE = 4096, MOST_PAGES = 1 << 18 };
#define MOVED ((uintptr_t)1 << 46)

static int memory; /* /proc/PID/mem of the tests */
static uintptr_t pages[MOST_PAGES];
static unsigned char *fetched; /* what each page was */
static int64_t page_count;
static uint32_t threads;

static void die(const char *why)
{
    fprintf(stderr, "neon_server: %s: %s\n", why, strerror(errno));
    _exit(1);
}

static void fetch(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    const uintptr_t page = (uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1);
    unsigned char *was = fetched + page_count * PAGE;
    if (page_count == MOST_PAGES) die("a call that touches more than a gigabyte");
    if (pread(memory, was, PAGE, (off_t)(page ^ MOVED)) != PAGE) die("an address that the tests do not have");
    void *here = mmap((void *)page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (here != (void *)page) die("no memory for a page");
    memcpy(here, was, PAGE);
    pages[page_count++] = page;
}

static void write_back(void)
{
    for (int64_t i = 0; i < page_count; i++) {
        const unsigned char *now = (const unsigned char *)pages[i], *was = fetched + i * PAGE;
        for (int64_t begin = 0, end; memcmp(now, was, PAGE) && begin < PAGE; begin = end) {
            while (begin < PAGE && now[begin] == was[begin]) begin++;
            for (end = begin; end < PAGE && now[end] != was[end];) end++;
            if (end > begin && pwrite(memory, now + begin, (size_t)(end - begin), (off_t)((pages[i] ^ MOVED) + (uintptr_t)begin)) < 0)
                die("results cannot be written");
        }
        munmap((void *)pages[i], PAGE);
    }
    page_count = 0;
}

#define MOVE(pointer) ((pointer) = (pointer) ? (void *)((uintptr_t)(pointer) ^ MOVED) : NULL)

static void move_layer(Layer *layer)
{
    MOVE(layer->key_center);
    for (Segment *s = layer->segments; s < layer->segments + layer->num_segments; s++)
        MOVE(s->k), MOVE(s->v), MOVE(s->k_scales), MOVE(s->v_scales);
}
static void move_table(Table *t) { MOVE(t->ids), MOVE(t->lengths); }
static void move_rows(DecodeCall *c)
{
    MOVE(c->out), MOVE(c->q), MOVE(c->kv_start), MOVE(c->key_mask), MOVE(c->sink_logits), move_table(&c->table);
    FirstTokens *first = &c->first_tokens;
    MOVE(first->k), MOVE(first->v), MOVE(first->row), MOVE(first->first), MOVE(first->stop);
}

/* The work is cut for as many threads as the tests have, and done by one. */
static int32_t serial_for(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void *), void *context)
{
    (void)grain;
    for (int64_t i = begin; i < end; i++) run(i, i + 1, context);
    return 0;
}
static int32_t count_threads(uint32_t *count) { return *count = threads, 0; }

static int64_t attend(const Layer *layer, Request *request)
{
    ExtendCall call;
    memcpy(&call, request->call, sizeof call);
    move_rows(&call.rows);
    if (request->function == DECODE) return int8_paged_decode(layer, &call.rows);
    MOVE(call.k_new), MOVE(call.v_new);
    return int8_paged_extend(layer, &call);
}

static int64_t carry_out(Request *request, char *name)
{
    Layer *layer = (Layer *)request->layer;
    AppendCall append;
    GatherCall gather;
    const int64_t *numbers = request->numbers;
    void *first = (void *)numbers[0], *second = (void *)numbers[1];
    const char *isa;
    memcpy(&append, request->call, sizeof append);
    memcpy(&gather, request->call, sizeof gather);
    move_layer(layer);
    switch (request->function) {
    case APPEND: MOVE(append.k_new), MOVE(append.v_new), move_table(&append.table); return int8_paged_append(layer, &append);
    case GATHER: MOVE(gather.k_out), MOVE(gather.v_out), move_table(&gather.table); return int8_paged_gather(layer, &gather);
    case DECODE:
    case EXTEND: return attend(layer, request);
    case COPY: return int8_paged_copy(layer, MOVE(first), MOVE(second), numbers[2]);
    case HADAMARD: int8_paged_hadamard(MOVE(first), MOVE(second), numbers[2], numbers[3]); return OK;
    case ISA: return (isa = int8_paged_isa(numbers[0])) ? snprintf(name, NAME_BYTES, "%s", isa) : 0;
    case SELECT_ISA: return int8_paged_select_isa(request->name);
    default: die("an unknown function"); return 0;
    }
}

int main(int count, char **arguments)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/mem", count > 1 ? arguments[1] : "");
    struct sigaction action = {.sa_sigaction = fetch, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    fetched = mmap(NULL, (size_t)MOST_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *addresses[2];
    int32_t (*run)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *) = serial_for;
    int32_t (*tell)(uint32_t *) = count_threads;
    memcpy(&addresses[0], &run, sizeof run);
    memcpy(&addresses[1], &tell, sizeof tell);
    int8_paged_set_threads(addresses[0], addresses[1]);
    Request request;
    while (fread(&request, sizeof request, 1, stdin) == 1) {
        if (!memory && (memory = open(path, O_RDWR)) < 0) die(path);
        Answer answer = {0};
        threads = (uint32_t)request.threads;
        answer.result = carry_out(&request, answer.name);
        write_back();
        if (write(1, &answer, sizeof answer) != sizeof answer) die("no one hears the answer");
    }
    return 0;
}
