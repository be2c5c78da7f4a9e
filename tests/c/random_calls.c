/* random_calls COUNT SEED ISA THREADS: made-up calls of the core, their buffers against pages that can't be touched.
 * Prints how often each function was called and how often it accepted. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/core/bitween.h"
#include "calls.h"
#include "memory.h"

int main(int argc, char **argv) {
    if (argc != 5) return fprintf(stderr, "COUNT SEED ISA THREADS\n"), 2;
    if (bw_choose_isa(argv[3])) return fprintf(stderr, "this machine has no %s\n", argv[3]), 2;
    bw_set_num_threads(atoi(argv[4]));
    const char *watched = getenv("BITWEEN_TEST_HEAP");
    uint64_t random = first_random(argv[2]);
    struct {
        const char *name;
        long calls, accepted;
    } tally[N_CALLS] = {0};
    for (long i = 0; i < atol(argv[1]); i++) {
        uint8_t bytes[96];
        make_up(&random, bytes, sizeof bytes);
        unsigned which = bytes[0] % N_CALLS;
        place = watched ? ON_HEAP : i % 2 ? BEFORE_GUARD : AFTER_GUARD;
        int status = call_from_bytes(bytes, sizeof bytes, &tally[which].name);
        tally[which].calls++;
        tally[which].accepted += !status;
    }
    for (int i = 0; i < N_CALLS; i++) printf("%s %ld %ld\n", tally[i].name, tally[i].calls, tally[i].accepted);
    return 0;
}
