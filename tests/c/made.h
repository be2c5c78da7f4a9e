/* Sizes, matrices and stored weights made up from bytes: what the hostile calls of calls.c and decoding.c share. */
#ifndef TEST_MADE_H
#define TEST_MADE_H

#include <stddef.h>
#include <stdint.h>

#include "../../csrc/core/bitween.h"

enum { MOST_BYTES = 1 << 22 }; /* of one buffer; what would need more is not called */

/* The bytes that a call is made of; zeros follow after their end. */
typedef struct {
    const uint8_t *at, *end;
} tape;

unsigned draw(tape *t, unsigned below);
uint64_t step_random(uint64_t *state);

/* Ends the program: the core has not kept what it promises. */
void broken(const char *what);

/* A size of at most `most`, now and then a hostile one. */
ptrdiff_t draw_size(tape *t, unsigned most);
/* n + by, around the end of the numbers too. */
ptrdiff_t larger(ptrdiff_t n, ptrdiff_t by);
bw_scheme draw_scheme(tape *t);
size_t width_of(bw_dtype dtype);
void fill_floats(tape *t, void *memory, ptrdiff_t n, bw_dtype dtype);
void fill_bytes(tape *t, void *memory, ptrdiff_t n);
/* A matrix view over memory that just holds it. Hostile shapes get one element: they must be refused, or be empty. */
bw_matrix draw_view(tape *t, ptrdiff_t rows, ptrdiff_t cols);
/* A plain array of n floats, exactly; NULL now and then. */
float *draw_array(tape *t, ptrdiff_t n);
/* XT X of a few rows, now and then spoiled. */
float *draw_hessian(tape *t, ptrdiff_t n);

/* Room for a stored matrix; too_large when the legal sizes are beyond what a test may take. */
bw_quantized room_for(bw_scheme s, ptrdiff_t rows, ptrdiff_t cols, bw_layout *layout, int *too_large);
void fill_stored(tape *t, bw_quantized *q, const bw_layout *l);
/* What was stored without an error must read back without one, and finite. */
void check_stored(const bw_quantized *q);
/* A number of the bytes of a stored matrix, to see that a refused call has written nothing. */
uint64_t digest(const bw_quantized *q, const bw_layout *l);
int refused(bw_status status);
/* Room for trellis codes; none for sizes that are hostile. */
bw_trellis trellis_room_for(tape *t, ptrdiff_t rows, ptrdiff_t cols, int32_t half_bits, ptrdiff_t *n_bytes);
/* Codes, scales and rates of room for trellis codes, mostly legal ones. */
void fill_trellis(tape *t, bw_trellis *stored, ptrdiff_t n_bytes);

/* ---- decoding.c ---- */
int call_decode(tape *t, int unused);

#endif
