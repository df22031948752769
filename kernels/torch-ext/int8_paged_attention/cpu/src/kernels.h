/* The kernels of one instruction set: include after its dot_*.h. */
#include "append.h"
#include "decode.h"
#include "extend.h"

#define KERNELS(isa, is_supported)                                                                          \
    const Kernels int8_paged_##isa = {#isa,        is_supported,  append_rows,  decode_item,               \
                                      extend_item, gather_blocks, hadamard_rows}
