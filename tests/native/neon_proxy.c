/* A library with the names of the CPU backend's, for the Python tests: every call is carried out by neon_server.c,
 * which was built for another processor and runs under an emulator. HF_INT8_PAGED_NEON_SERVER is the command, by words. */
#include "neon_call.h"

#include "int8_paged.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static pid_t owner; /* the process whose server this is: a forked one needs its own */
static int to_server, from_server;
static int32_t (*thread_count)(uint32_t *count);

_Static_assert(sizeof(ExtendCall) <= RECORD_BYTES, "a record is longer than a request");

static void die(const char *why)
{
    fprintf(stderr, "the emulated kernels are gone: %s\n", why);
    abort();
}

static void start(void)
{
    enum { MOST_WORDS = 16 };
    const char *command = getenv("HF_INT8_PAGED_NEON_SERVER");
    int request[2], answer[2], count = 0;
    char *words[MOST_WORDS], process[32], *copy = command ? strdup(command) : NULL;
    for (char *word = strtok(copy, " "); word && count < MOST_WORDS - 2; word = strtok(NULL, " ")) words[count++] = word;
    if (!count || pipe(request) || pipe(answer)) die("HF_INT8_PAGED_NEON_SERVER is not set, or there are no pipes");
    snprintf(process, sizeof process, "%d", (int)getpid());
    words[count] = process, words[count + 1] = NULL;
    signal(SIGPIPE, SIG_IGN);
    const pid_t child = fork();
    if (!child) {
        dup2(request[0], 0), dup2(answer[1], 1);
        for (int fd = 3; fd < 1024; fd++) close(fd);
        execvp(words[0], words);
        _exit(127);
    }
    close(request[0]), close(answer[1]), free(copy);
    to_server = request[1], from_server = answer[0], owner = getpid();
    prctl(PR_SET_PTRACER, child, 0, 0, 0); /* it reads and writes this process's memory */
}

static int transfer(ssize_t (*move)(int, void *, size_t), int fd, void *bytes, size_t count)
{
    for (size_t done = 0; done < count;) {
        const ssize_t moved = move(fd, (char *)bytes + done, count - done);
        if (moved <= 0) return 0;
        done += (size_t)moved;
    }
    return 1;
}
static ssize_t put(int fd, void *bytes, size_t count) { return write(fd, bytes, count); }

static Answer ask(Request *request)
{
    Answer answer;
    uint32_t threads = 1;
    if (thread_count && thread_count(&threads)) threads = 1;
    request->threads = threads;
    pthread_mutex_lock(&one_at_a_time);
    if (owner != getpid()) start();
    if (!transfer(put, to_server, request, sizeof *request) || !transfer(read, from_server, &answer, sizeof answer))
        die("no answer");
    pthread_mutex_unlock(&one_at_a_time);
    return answer;
}

static void copy_layer(Request *request, const Layer *layer)
{
    const size_t size = sizeof *layer + (size_t)layer->num_segments * sizeof(Segment);
    if (size > LAYER_BYTES) die("a layer of more segments than a request takes");
    memcpy(request->layer, layer, size);
}

static int64_t with_records(int64_t function, const Layer *layer, const void *call, size_t size)
{
    Request request = {.function = function};
    copy_layer(&request, layer);
    memcpy(request.call, call, size);
    return ask(&request).result;
}

INT8_PAGED_EXPORT int64_t int8_paged_append(const Layer *layer, const AppendCall *call)
{
    return with_records(APPEND, layer, call, sizeof *call);
}
INT8_PAGED_EXPORT int64_t int8_paged_decode(const Layer *layer, const DecodeCall *call)
{
    return with_records(DECODE, layer, call, sizeof *call);
}
INT8_PAGED_EXPORT int64_t int8_paged_extend(const Layer *layer, const ExtendCall *call)
{
    return with_records(EXTEND, layer, call, sizeof *call);
}
INT8_PAGED_EXPORT int64_t int8_paged_gather(const Layer *layer, const GatherCall *call)
{
    return with_records(GATHER, layer, call, sizeof *call);
}
INT8_PAGED_EXPORT int64_t int8_paged_copy(const Layer *layer, const int32_t *src, const int32_t *dst, int64_t count)
{
    Request request = {.function = COPY, .numbers = {(int64_t)src, (int64_t)dst, count}};
    copy_layer(&request, layer);
    return ask(&request).result;
}
INT8_PAGED_EXPORT void int8_paged_hadamard(float *out, const float *x, int64_t rows, int64_t dim)
{
    Request request = {.function = HADAMARD, .numbers = {(int64_t)out, (int64_t)x, rows, dim}};
    ask(&request);
}

INT8_PAGED_EXPORT const char *int8_paged_isa(int64_t i)
{
    static char names[8][NAME_BYTES];
    Request request = {.function = ISA, .numbers = {i}};
    const Answer answer = ask(&request);
    if (!answer.result || i < 0 || i >= 8) return NULL;
    return memcpy(names[i], answer.name, NAME_BYTES);
}
INT8_PAGED_EXPORT int64_t int8_paged_select_isa(const char *name)
{
    Request request = {.function = SELECT_ISA};
    snprintf(request.name, NAME_BYTES, "%s", name);
    return ask(&request).result;
}
INT8_PAGED_EXPORT void int8_paged_set_threads(void *parallel_for, void *count)
{
    (void)parallel_for;
    memcpy(&thread_count, &count, sizeof count);
}
INT8_PAGED_EXPORT int64_t int8_paged_record_size(int64_t i)
{
    static const int64_t sizes[] = {sizeof(Layer), sizeof(Segment), sizeof(AppendCall), sizeof(DecodeCall),
                                    sizeof(FirstTokens), sizeof(GatherCall), sizeof(ExtendCall)};
    return i >= 0 && i < (int64_t)(sizeof sizes / sizeof *sizes) ? sizes[i] : 0;
}
