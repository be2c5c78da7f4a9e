/* Buffers for hostile tests: exactly as large as asked for, so that one byte too far is noticed. */
#ifndef TEST_MEMORY_H
#define TEST_MEMORY_H

#include <stddef.h>

/* Where the buffers of one call lie: on the heap, where a sanitizer watches their ends, or against a page that can't
 * be touched, after them or before them. */
typedef enum { ON_HEAP, BEFORE_GUARD, AFTER_GUARD } placing;

extern placing place;

/* `bytes` of memory that stays until release_all; never NULL. */
void *take(size_t bytes);
void release_all(void);

#endif
