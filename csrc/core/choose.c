/* The k largest of n numbers, those that torch.topk takes among equal ones.
 *
 * Which of two experts with equal numbers is taken decides what a model says next, and numbers of 16 bits are often
 * equal. torch.topk leaves it to std::nth_element, or to std::partial_sort where k is small beside n. So these are
 * their algorithms as libstdc++ has them: the same comparisons in the same order, hence the same choice. */
#include "choose.h"

static int above(bw_ranked a, bw_ranked b) {
    int a_nan = a.value != a.value, b_nan = b.value != b.value;
    return (a_nan && !b_nan) || a.value > b.value;
}

static void swap(bw_ranked *a, bw_ranked *b) {
    bw_ranked kept = *a;
    *a = *b;
    *b = kept;
}

/* ---- a heap whose first is the least ---- */

static void rise(bw_ranked *heap, ptrdiff_t hole, ptrdiff_t top, bw_ranked value) {
    ptrdiff_t parent = (hole - 1) / 2;
    while (hole > top && above(heap[parent], value)) {
        heap[hole] = heap[parent];
        hole = parent;
        parent = (hole - 1) / 2;
    }
    heap[hole] = value;
}

static void sink(bw_ranked *heap, ptrdiff_t hole, ptrdiff_t n, bw_ranked value) {
    ptrdiff_t top = hole, child = hole;
    while (child < (n - 1) / 2) {
        child = 2 * (child + 1);
        if (above(heap[child], heap[child - 1])) child--;
        heap[hole] = heap[child];
        hole = child;
    }
    if (n % 2 == 0 && child == (n - 2) / 2) {
        child = 2 * (child + 1);
        heap[hole] = heap[child - 1];
        hole = child - 1;
    }
    rise(heap, hole, top, value);
}

/* The heap's first to `place`, whose value joins the other n. */
static void exchange(bw_ranked *heap, ptrdiff_t n, bw_ranked *place) {
    bw_ranked value = *place;
    *place = *heap;
    sink(heap, 0, n, value);
}

/* The k largest in front, as a heap. */
static void select_by_heap(bw_ranked *all, ptrdiff_t n, ptrdiff_t k) {
    for (ptrdiff_t i = (k - 2) / 2; k > 1 && i >= 0; i--) sink(all, i, k, all[i]);
    for (ptrdiff_t i = k; i < n; i++)
        if (above(all[i], all[0])) exchange(all, k, all + i);
}

/* ---- selection by parting ---- */

static void sort_by_insertion(bw_ranked *all, ptrdiff_t n) {
    for (ptrdiff_t i = 1; i < n; i++) {
        bw_ranked value = all[i];
        ptrdiff_t to = i;
        for (; to > 0 && above(value, all[to - 1]); to--) all[to] = all[to - 1];
        all[to] = value;
    }
}

static void median_to_front(bw_ranked *front, bw_ranked *a, bw_ranked *b, bw_ranked *c) {
    if (above(*a, *b)) swap(front, above(*b, *c) ? b : above(*a, *c) ? c : a);
    else swap(front, above(*a, *c) ? a : above(*b, *c) ? c : b);
}

/* Where those that are not above the pivot, all[first], begin. Some number on either side of it stops both walks. */
static ptrdiff_t part(bw_ranked *all, ptrdiff_t first, ptrdiff_t last) {
    bw_ranked *pivot = all + first;
    median_to_front(pivot, pivot + 1, pivot + (last - first) / 2, all + last - 1);
    for (ptrdiff_t low = first + 1, high = last;; low++) {
        while (above(all[low], *pivot)) low++;
        high--;
        while (above(*pivot, all[high])) high--;
        if (low >= high) return low;
        swap(all + low, all + high);
    }
}

static void select_by_parts(bw_ranked *all, ptrdiff_t n, ptrdiff_t nth) {
    ptrdiff_t first = 0, last = n;
    int depth = 0;
    for (ptrdiff_t left = n; left > 1; left /= 2) depth += 2;
    while (last - first > 3) {
        if (!depth--) {
            select_by_heap(all + first, last - first, nth + 1 - first);
            swap(all + first, all + nth);
            return;
        }
        ptrdiff_t cut = part(all, first, last);
        if (cut <= nth) first = cut;
        else last = cut;
    }
    sort_by_insertion(all + first, last - first);
}

void bw_choose(bw_ranked *all, ptrdiff_t n, ptrdiff_t k) {
    if (k * 64 <= n) {
        select_by_heap(all, n, k);
        for (ptrdiff_t left = k - 1; left > 0; left--) exchange(all, left, all + left);
        return;
    }
    select_by_parts(all, n, k - 1);
    sort_by_insertion(all, k - 1);
}
