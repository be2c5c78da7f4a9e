#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 64 };

placing place = ON_HEAP;

static struct {
    void *memory;
    size_t mapped; /* 0: on the heap */
} taken[MOST];
static int n_taken;

static void give_up(const char *what) {
    fprintf(stderr, "%s\n", what);
    abort();
}

void *take(size_t bytes) {
    if (n_taken == MOST) give_up("too many buffers in one call");
    if (place == ON_HEAP) {
        void *p = malloc(bytes ? bytes : 1);
        if (!p) give_up("no memory for a test");
        taken[n_taken].memory = p;
        taken[n_taken++].mapped = 0;
        return p;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page, all = inner + 2 * page;
    char *p = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || (inner && mprotect(p + page, inner, PROT_READ | PROT_WRITE))) give_up("no pages for a test");
    taken[n_taken].memory = p;
    taken[n_taken++].mapped = all;
    return p + page + (place == BEFORE_GUARD ? inner - bytes : 0);
}

void release_all(void) {
    while (n_taken) {
        n_taken--;
        if (taken[n_taken].mapped) munmap(taken[n_taken].memory, taken[n_taken].mapped);
        else free(taken[n_taken].memory);
    }
}
