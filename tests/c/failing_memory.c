/* failing_memory COUNT SEED: made-up calls of the core, each repeated while the n-th allocation fails, once and from
 * then on, for n = 1, 2, ... until none does. A call must then say so or not have needed it, and nothing may stay.
 * Link with -Wl,--wrap=posix_memalign,--wrap=free. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../csrc/core/bitween.h"
#include "calls.h"
#include "memory.h"

int __real_posix_memalign(void **p, size_t alignment, size_t size);
int __wrap_posix_memalign(void **p, size_t alignment, size_t size);
void __real_free(void *p);
void __wrap_free(void *p);

static long n_asked, fail_at, n_held, n_failed;
static int for_good;

/* Only the core takes memory this way (alloc.c); the tests' own buffers come from malloc or mmap. */
int __wrap_posix_memalign(void **p, size_t alignment, size_t size) {
    n_asked++;
    if (fail_at && (n_asked == fail_at || (for_good && n_asked > fail_at))) {
        n_failed++;
        return ENOMEM;
    }
    n_held++;
    return __real_posix_memalign(p, alignment, size);
}

void __wrap_free(void *p) {
    if (p) n_held--;
    __real_free(p);
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "COUNT SEED\n"), 2;
    if (bw_choose_isa(NULL)) return 2;
    uint64_t random = first_random(argv[2]);
    place = BEFORE_GUARD;
    long reported = 0;
    for (long i = 0; i < atol(argv[1]); i++) {
        uint8_t bytes[96];
        make_up(&random, bytes, sizeof bytes);
        const char *name;
        fail_at = 0;
        call_from_bytes(bytes, sizeof bytes, &name); /* lazily made things are made now */
        n_held = n_asked = 0;
        int expected = call_from_bytes(bytes, sizeof bytes, &name);
        if (n_held) return printf("%s keeps %ld pieces\n", name, n_held), 1;
        long needed = n_asked;
        for (for_good = 0; for_good < 2; for_good++) {
            for (long n = 1; n <= needed; n++) {
                n_held = n_asked = n_failed = 0;
                fail_at = n;
                int status = call_from_bytes(bytes, sizeof bytes, &name);
                fail_at = 0;
                if (n_held) return printf("%s keeps %ld pieces after allocation %ld failed\n", name, n_held, n), 1;
                if (n_failed && status != BW_ERR_MEMORY && status != expected)
                    return printf("%s: %d where %d was due after allocation %ld failed\n", name, status, expected, n),
                           1;
                reported += status == BW_ERR_MEMORY;
            }
        }
    }
    printf("%ld allocations failed and were reported\n", reported);
    return reported ? 0 : 1;
}
