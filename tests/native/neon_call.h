/* What neon_proxy.c asks of neon_server.c, over a pipe. Addresses are the asking process's. */
#include <stdint.h>

enum { APPEND, DECODE, EXTEND, GATHER, COPY, HADAMARD, ISA, SELECT_ISA };
enum { LAYER_BYTES = 8192, RECORD_BYTES = 512, NAME_BYTES = 32 };

typedef struct {
    int64_t function, threads;       /* threads: how many the work is cut for; one does it all */
    int64_t numbers[4];              /* arguments that are no records, in their order */
    unsigned char call[RECORD_BYTES];
    _Alignas(8) unsigned char layer[LAYER_BYTES]; /* and its segments */
    char name[NAME_BYTES];
} Request;

typedef struct {
    int64_t result;
    char name[NAME_BYTES];
} Answer;
