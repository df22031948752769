/* What torch_parallel_for does, by a thread for each item, all at once. */
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    int64_t item;
    void (*run)(int64_t, int64_t, void *);
    void *context;
} Item;
static void *run_item(void *x)
{
    const Item *item = x;
    return item->run(item->item, item->item + 1, item->context), NULL;
}
static int32_t threaded_for(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void *), void *context)
{
    pthread_t threads[64];
    Item items[64];
    (void)grain;
    if (end - begin > 64) return 1;
    for (int64_t i = begin; i < end; i++) {
        items[i - begin] = (Item){i, run, context};
        if (pthread_create(&threads[i - begin], NULL, run_item, &items[i - begin])) abort();
    }
    for (int64_t i = begin; i < end; i++) pthread_join(threads[i - begin], NULL);
    return 0;
}
