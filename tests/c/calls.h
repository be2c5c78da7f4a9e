/* One call of the core, made up from bytes: the common part of the fuzz target, the random driver and the fault loops.
 */
#ifndef TEST_CALLS_H
#define TEST_CALLS_H

#include <stddef.h>
#include <stdint.h>

enum { N_CALLS = 23 };

/* Reads a function, schemes, shapes, strides, types and values from `bytes`, calls it and returns its bw_status. What
 * the core promises of every call is checked: abort() otherwise. `named` is set to the function's name. */
int call_from_bytes(const uint8_t *bytes, size_t n, const char **named);

/* Bytes of a made-up call, from a random state that it moves on; the first state of a seed, written as a number. */
void make_up(uint64_t *random, uint8_t *bytes, size_t n);
uint64_t first_random(const char *seed);

#endif
