/* The policy's algorithm on flat arrays; `forebay_cache.engine.policy_core` is its twin and says what all of it means.

   A cache is some lists over numbered slots. Slot numbers from `slots` on are the sentinels of the lists; slot 0 is
   nobody's. Where a function here and its twin differ in anything but speed, that is a bug. */

#ifndef FOREBAY_POLICY_CORE_H
#define FOREBAY_POLICY_CORE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "_streams.h"

#define BUCKETS 16
#define LIST_WINDOW 16
#define LIST_RING 17
#define LIST_PASSING 18
#define LISTS 19
#define COUNT_MAX 15
#define ROWS 4
#define COUNTERS_PER_BLOCK 24
#define AGEING_ACCESSES 10
#define HUGE_PAGE ((size_t)2 << 20)
#define HUGE_SIZE_MIN ((size_t)1 << 20)
#define SWEEP_STEP 4
#define SETTLE_STEPS_MAX 4
#define VICTIMS_SKIPPED_MAX 8
#define ATTACK_COUNT 6
#define FAVOURED_COUNT 2
#define ATTACK_MASK 127
#define VOLUME_SLOTS 4096
#define LBA_BITS 40
#define PLANS 7
#define PLAN_AT_START 5
#define MISS_GROUPS 64
#define SCORES_PER_CAPACITY 10
#define SCORE_DECAY 0.9
#define SCORE_LEAD 0.002
#define REGION_SHIFT 5
#define COUNT_MASK 31
#define OUTSIDE 1 /* known, not worth keeping; in a miniature: in the ring */
#define WINDOW 2
#define MAIN 3
#define PASSING 4 /* outside of the cache: read in a long stream, in memory for a while */

#define MISSED 0
#define HIT 1
#define HIT_PASSING 2 /* in memory, but for a long stream alone: the store had to bring it */

static const double PLAN_WINDOWS[PLANS] = {0.0, 0.0, 0.03, 0.1, 0.2, 0.4, 0.8};
static const int PLAN_MARGIN_FROM[PLANS] = {0, 3, 3, 3, 3, 3, 3};
static const uint64_t ROW_FACTORS[ROWS] = {
    0x9E3779B97F4A7C15u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0xD6E8FEB86659FD93u};
#define MINIATURE_FACTOR 0xA0761D6478BD642Fu
#define SAMPLE_FACTOR 0xE7037ED1A0B428DBu
#define SAMPLE_SEED 0x5A17u /* the same in each life, so that a sample outlives the daemon */
#define PASSES ((uint64_t)1 << 63) /* set in a key: the block was read in a long stream */

typedef struct {
    uint8_t *counters; /* two in each byte, the even one in the low half */
    void *memory; /* that they lie in, if it was mapped for them: `memory_size` bytes */
    size_t memory_size;
    uint64_t width; /* counters of a row, a multiple of 16 */
    uint64_t swept, accesses, period, seed;
} sketch_t;

typedef struct {
    uint32_t *next, *prev;
    uint8_t *states;
    const uint64_t *keys;
    uint32_t slots;
    int64_t capacity, window_max, ring_max, window_count, ring_count, passing_count, count, hits, writes, accesses;
    uint64_t swept, random;
    int margin_from;
    const sketch_t *sketch;
    int64_t *volume_counts; /* by volume slot; NULL in a miniature */
    uint8_t *floored;
    int64_t floor;
    uint64_t volume_of_zero; /* whose a slot without a key is */
} cache_t;

typedef struct {
    cache_t cache;
    uint64_t *keys;
    uint32_t *index; /* open addressing: slots by key */
    uint64_t index_mask;
    uint32_t unused, fresh; /* first of the slots that were freed, chained by `next`; first that never held a key */
} keyed_t;

typedef struct {
    keyed_t minis[PLANS];
    uint64_t limit; /* of the hash of a key that the miniatures see */
    double scores[PLANS], price;
    int plan, plan_max, scored;
    int64_t until_score;
} chooser_t;

static inline uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCDu;
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53u;
    return x ^ x >> 33;
}

static inline uint64_t sample_hash(uint64_t key, uint64_t seed) { return mix((key & ~PASSES) ^ seed) * SAMPLE_FACTOR; }

static inline uint64_t hash_of(const sketch_t *sketch, uint64_t key) { return mix(key ^ sketch->seed); }

/* --- the sketch */

static inline uint64_t counter_at(const sketch_t *sketch, uint64_t hash, int row)
{
    return (((hash * ROW_FACTORS[row]) >> 32) * sketch->width >> 32) + (uint64_t)row * sketch->width;
}

static inline int raw_counter(const sketch_t *sketch, uint64_t at)
{
    return sketch->counters[at >> 1] >> ((at & 1) << 2) & 15;
}

static inline uint64_t sketch_words(const sketch_t *sketch) { return sketch->width * ROWS / 16; }

static inline int is_swept(const sketch_t *sketch, uint64_t at) { return at >> 4 < sketch->swept; }

static inline int frequency(const sketch_t *sketch, uint64_t hash)
{
    int least = COUNT_MAX;
    for (int row = 0; row < ROWS; row++) {
        const uint64_t at = counter_at(sketch, hash, row);
        const int value = raw_counter(sketch, at) >> !is_swept(sketch, at);
        if (value < least)
            least = value;
    }
    return least;
}

static void raise_to(sketch_t *sketch, uint64_t hash, int count)
{
    for (int row = 0; row < ROWS; row++) {
        const uint64_t at = counter_at(sketch, hash, row);
        const int shift = !is_swept(sketch, at), raw = raw_counter(sketch, at);
        const int wanted = count << shift > 15 ? 15 : count << shift;
        if (raw >> shift < count && wanted > raw) {
            const int nibble = (at & 1) << 2;
            sketch->counters[at >> 1] = (uint8_t)((sketch->counters[at >> 1] & ~(15 << nibble)) | wanted << nibble);
        }
    }
}

/* Count an access; returns the frequency now. `*halved` tells that all counters are to be halved from now on. */
static int count_access(sketch_t *sketch, uint64_t hash, int *halved)
{
    int count = frequency(sketch, hash);
    if (count < COUNT_MAX)
        raise_to(sketch, hash, ++count);
    const uint64_t words = sketch_words(sketch);
    for (int step = 0; step < SWEEP_STEP && sketch->swept < words; step++) {
        uint64_t word;
        memcpy(&word, sketch->counters + 8 * sketch->swept, 8);
        word = word >> 1 & 0x7777777777777777u;
        memcpy(sketch->counters + 8 * sketch->swept, &word, 8);
        sketch->swept++;
    }
    *halved = ++sketch->accesses >= sketch->period && sketch->swept >= words;
    if (*halved) {
        sketch->accesses = 0;
        sketch->swept = 0;
        count = frequency(sketch, hash);
    }
    return count;
}

/* --- lists */

static inline void link_last(cache_t *cache, int list, uint32_t slot)
{
    const uint32_t end = cache->slots + (uint32_t)list, last = cache->prev[end];
    cache->prev[slot] = last;
    cache->next[slot] = end;
    cache->next[last] = slot;
    cache->prev[end] = slot;
}

static inline void unlink_slot(cache_t *cache, uint32_t slot)
{
    cache->next[cache->prev[slot]] = cache->next[slot];
    cache->prev[cache->next[slot]] = cache->prev[slot];
}

static inline uint32_t oldest(const cache_t *cache, int list)
{
    const uint32_t end = cache->slots + (uint32_t)list, slot = cache->next[end];
    return slot == end ? 0 : slot;
}

static inline int region_of(const cache_t *cache, uint32_t slot) { return cache->states[slot] >> REGION_SHIFT; }

static inline int bucket_of(const cache_t *cache, uint32_t slot)
{
    const int count = (cache->states[slot] & COUNT_MASK) >> (slot >= cache->swept);
    return count > COUNT_MAX ? COUNT_MAX : count;
}

static inline void set_state(cache_t *cache, uint32_t slot, int region, int bucket)
{
    cache->states[slot] = (uint8_t)(region << REGION_SHIFT | bucket << (slot >= cache->swept));
}

static inline uint64_t volume_slot(const cache_t *cache, uint32_t slot)
{
    const uint64_t key = cache->keys[slot];
    return (key ? key >> LBA_BITS : cache->volume_of_zero) % VOLUME_SLOTS;
}

static inline int is_below_floor(const cache_t *cache, uint64_t volume)
{
    return cache->floor && cache->floored[volume] && cache->volume_counts[volume] < cache->floor;
}

static inline int is_floored(const cache_t *cache, uint32_t slot)
{
    return cache->floor && is_below_floor(cache, volume_slot(cache, slot));
}

/* A slot leaves its list; what becomes of its state is the caller's matter. */
static void take_out(cache_t *cache, uint32_t slot)
{
    unlink_slot(cache, slot);
    cache->count--;
    if (region_of(cache, slot) == WINDOW)
        cache->window_count--;
    else if (region_of(cache, slot) == OUTSIDE)
        cache->ring_count--;
    if (cache->volume_counts)
        cache->volume_counts[volume_slot(cache, slot)]--;
}

static void put_in(cache_t *cache, uint32_t slot, int region, int bucket)
{
    set_state(cache, slot, region, bucket);
    link_last(cache, region == MAIN ? bucket : region == WINDOW ? LIST_WINDOW : LIST_RING, slot);
    cache->count++;
    if (region == WINDOW)
        cache->window_count++;
    else if (region == OUTSIDE)
        cache->ring_count++;
    if (cache->volume_counts)
        cache->volume_counts[volume_slot(cache, slot)]++;
}

static void free_slot(keyed_t *keyed, uint32_t slot);

static void evict(cache_t *cache, uint32_t slot, keyed_t *keyed)
{
    take_out(cache, slot);
    if (keyed)
        free_slot(keyed, slot);
    else
        set_state(cache, slot, OUTSIDE, 0);
}

/* The oldest of the lowest bucket, but volumes below their floor are passed over a few times; 0 if main is empty. */
static uint32_t find_victim(cache_t *cache)
{
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        uint32_t slot = oldest(cache, bucket);
        if (slot == 0)
            continue;
        for (int step = 0; step < VICTIMS_SKIPPED_MAX && is_floored(cache, slot); step++) {
            unlink_slot(cache, slot);
            link_last(cache, bucket, slot);
            slot = oldest(cache, bucket);
        }
        return slot;
    }
    return 0;
}

static int is_admitted(cache_t *cache, int count, uint32_t victim)
{
    const int other = bucket_of(cache, victim);
    if (count > other + (other >= cache->margin_from))
        return 1;
    if (count < ATTACK_COUNT)
        return 0;
    cache->random ^= cache->random << 13;
    cache->random ^= cache->random >> 7;
    cache->random ^= cache->random << 17;
    return (cache->random & ATTACK_MASK) == 0;
}

/* Whether a block of this count and volume may have the victim's place. */
static int may_replace(cache_t *cache, int count, uint64_t volume, uint32_t victim)
{
    if (count >= FAVOURED_COUNT && is_below_floor(cache, volume) && !is_floored(cache, victim))
        return 1;
    return is_admitted(cache, count, victim);
}

static inline int count_of(const cache_t *cache, uint32_t slot)
{
    return frequency(cache->sketch, hash_of(cache->sketch, cache->keys[slot]));
}

static inline int64_t main_max(const cache_t *cache) { return cache->capacity - cache->window_max - cache->ring_max; }

static inline int64_t main_count(const cache_t *cache)
{
    return cache->count - cache->window_count - cache->ring_count;
}

/* Whether a block of this count may come in from the ring. */
static int admits(cache_t *cache, int count, uint64_t volume)
{
    if (cache->window_max > 0 || cache->count < cache->capacity)
        return 1;
    const uint32_t victim = find_victim(cache);
    return victim == 0 || may_replace(cache, count, volume, victim);
}

/* Whether a block of this count that is read in a long stream is not to come in: it would have to beat the victim by
   more than one, whatever the plan. While there is room nothing is passed over. */
static int passes_over(cache_t *cache, int count)
{
    if (cache->count < cache->capacity)
        return 0;
    const uint32_t victim = find_victim(cache);
    return count <= 1 + (victim ? bucket_of(cache, victim) : 0);
}

static void leave_ring(cache_t *cache, keyed_t *keyed)
{
    const uint32_t slot = oldest(cache, LIST_RING);
    const int count = count_of(cache, slot);
    take_out(cache, slot);
    if (cache->window_max > 0 || main_count(cache) < main_max(cache)) {
        cache->writes++;
        put_in(cache, slot, cache->window_max > 0 ? WINDOW : MAIN, count);
        return;
    }
    const uint32_t victim = find_victim(cache);
    if (victim == 0 || !may_replace(cache, count, volume_slot(cache, slot), victim)) {
        free_slot(keyed, slot);
        return;
    }
    evict(cache, victim, keyed);
    cache->writes++;
    put_in(cache, slot, MAIN, count);
}

static void leave_window(cache_t *cache, keyed_t *keyed)
{
    const uint32_t slot = oldest(cache, LIST_WINDOW);
    const int is_full = main_count(cache) >= main_max(cache) || cache->count > cache->capacity;
    const uint32_t victim = is_full ? find_victim(cache) : 0;
    if (is_full && victim == 0) { /* always so in an LRU, which has no sketch */
        evict(cache, slot, keyed);
        return;
    }
    const int count = count_of(cache, slot);
    if (is_full) {
        if (!may_replace(cache, count, volume_slot(cache, slot), victim)) {
            evict(cache, slot, keyed);
            return;
        }
        evict(cache, victim, keyed);
    }
    take_out(cache, slot);
    put_in(cache, slot, MAIN, count);
}

/* Bring the lists back to their bounds, a few steps at a time. */
static void settle(cache_t *cache, keyed_t *keyed)
{
    for (int step = 0; step < SETTLE_STEPS_MAX; step++) {
        if (cache->ring_count > cache->ring_max)
            leave_ring(cache, keyed);
        else if (cache->window_count > cache->window_max)
            leave_window(cache, keyed);
        else if (cache->count > cache->capacity) {
            const uint32_t victim = main_count(cache) > main_max(cache) ? find_victim(cache) : oldest(cache, LIST_WINDOW);
            evict(cache, victim ? victim : oldest(cache, LIST_WINDOW), keyed);
        } else
            return;
    }
}

/* A block that is in one of the lists was used. */
static void touch(cache_t *cache, uint32_t slot, keyed_t *keyed)
{
    const int region = region_of(cache, slot);
    if (region >= WINDOW) {
        const int bucket = bucket_of(cache, slot);
        const int raised = bucket < COUNT_MAX ? bucket + 1 : bucket;
        unlink_slot(cache, slot);
        set_state(cache, slot, region, raised);
        link_last(cache, region == MAIN ? raised : LIST_WINDOW, slot);
    }
    settle(cache, keyed);
}

/* A block that was in none of the lists lies in a slot now, let in by `admits` or because it had to be. */
static void enter(cache_t *cache, uint32_t slot)
{
    put_in(cache, slot, cache->window_max > 0 ? WINDOW : MAIN, count_of(cache, slot));
    settle(cache, NULL);
}

static void splice(cache_t *cache, int from, int to)
{
    const uint32_t source = cache->slots + (uint32_t)from, target = cache->slots + (uint32_t)to;
    if (source == target || cache->next[source] == source)
        return;
    const uint32_t first = cache->next[source], last = cache->prev[source], before = cache->prev[target];
    cache->next[before] = first;
    cache->prev[first] = before;
    cache->next[last] = target;
    cache->prev[target] = last;
    cache->next[source] = cache->prev[source] = source;
}

/* All counts are halved: buckets 2i and 2i + 1 become i at once, the states of the slots follow step by step. */
static void halve(cache_t *cache)
{
    while (cache->swept < cache->slots) { /* a small share, if any: ageing is slower than sweeping */
        cache->states[cache->swept] =
            (uint8_t)((cache->states[cache->swept] & ~COUNT_MASK) | (cache->states[cache->swept] & COUNT_MASK) >> 1);
        cache->swept++;
    }
    for (int bucket = 0; bucket < BUCKETS; bucket++)
        splice(cache, bucket, bucket / 2);
    cache->swept = 0;
}

static inline void sweep(cache_t *cache)
{
    for (int step = 0; step < SWEEP_STEP && cache->swept < cache->slots; step++, cache->swept++) {
        const uint8_t state = cache->states[cache->swept];
        cache->states[cache->swept] = (uint8_t)((state & ~COUNT_MASK) | (state & COUNT_MASK) >> 1);
    }
}

/* --- caches that know their blocks by key */

static uint64_t home_of(const keyed_t *keyed, uint64_t key) { return mix(key) & keyed->index_mask; }

static uint32_t find_slot(const keyed_t *keyed, uint64_t key)
{
    for (uint64_t at = home_of(keyed, key); keyed->index[at]; at = (at + 1) & keyed->index_mask)
        if (keyed->keys[keyed->index[at]] == key)
            return keyed->index[at];
    return 0;
}

static void free_slot(keyed_t *keyed, uint32_t slot)
{
    uint64_t at = home_of(keyed, keyed->keys[slot]);
    while (keyed->index[at] != slot)
        at = (at + 1) & keyed->index_mask;
    for (uint64_t next = at;;) { /* close the gap */
        next = (next + 1) & keyed->index_mask;
        if (keyed->index[next] == 0)
            break;
        const uint64_t home = home_of(keyed, keyed->keys[keyed->index[next]]);
        if (((next - home) & keyed->index_mask) >= ((next - at) & keyed->index_mask)) {
            keyed->index[at] = keyed->index[next];
            at = next;
        }
    }
    keyed->index[at] = 0;
    keyed->cache.states[slot] = 0;
    keyed->cache.next[slot] = keyed->unused;
    keyed->unused = slot;
}

static uint32_t new_slot(keyed_t *keyed, uint64_t key)
{
    uint32_t slot = keyed->unused;
    if (slot)
        keyed->unused = keyed->cache.next[slot];
    else
        slot = keyed->fresh++;
    uint64_t at = home_of(keyed, key);
    while (keyed->index[at])
        at = (at + 1) & keyed->index_mask;
    keyed->index[at] = slot;
    keyed->keys[slot] = key;
    return slot;
}

/* A block that passes by is held in memory beside the cache, as one that came with another is. */
static void hold_passing(keyed_t *keyed, uint32_t slot)
{
    cache_t *cache = &keyed->cache;
    set_state(cache, slot, PASSING, 0);
    link_last(cache, LIST_PASSING, slot);
    if (++cache->passing_count <= cache->ring_max)
        return;
    const uint32_t first = oldest(cache, LIST_PASSING);
    unlink_slot(cache, first);
    cache->passing_count--;
    free_slot(keyed, first);
}

/* A block that is in no list of the cache comes to it. */
static void bring_in(keyed_t *keyed, uint32_t slot)
{
    cache_t *cache = &keyed->cache;
    if (cache->ring_max > 0) {
        put_in(cache, slot, OUTSIDE, 0);
    } else {
        cache->writes++;
        put_in(cache, slot, WINDOW, 0);
    }
    settle(cache, keyed);
}

/* A block is used that is not in the cache, and not in memory unless `slot` holds it as one that passed by. */
static void bring(keyed_t *keyed, uint32_t slot, uint64_t key, int passes)
{
    cache_t *cache = &keyed->cache;
    const int is_over = passes && passes_over(cache, frequency(cache->sketch, hash_of(cache->sketch, key)));
    if (slot == 0) {
        slot = new_slot(keyed, key);
        if (is_over)
            hold_passing(keyed, slot);
        else
            bring_in(keyed, slot);
    } else if (!is_over) {
        unlink_slot(cache, slot);
        cache->passing_count--;
        bring_in(keyed, slot);
    }
}

/* One access, as part of a long stream or not. */
static int access_key(keyed_t *keyed, uint64_t key, int passes)
{
    cache_t *cache = &keyed->cache;
    cache->accesses++;
    sweep(cache);
    const uint32_t slot = find_slot(keyed, key);
    cache->hits += slot != 0;
    if (slot && region_of(cache, slot) != PASSING) {
        touch(cache, slot, keyed);
        return HIT;
    }
    bring(keyed, slot, key, passes);
    return slot ? HIT_PASSING : MISSED;
}

static int begin_cache(cache_t *cache, uint32_t slots, int64_t capacity, const sketch_t *sketch)
{
    cache->slots = slots;
    cache->capacity = capacity;
    cache->sketch = sketch;
    cache->random = 88172645463325252u;
    cache->swept = slots;
    cache->next = calloc(slots + LISTS, 4);
    cache->prev = calloc(slots + LISTS, 4);
    if (cache->next == NULL || cache->prev == NULL)
        return -1;
    for (uint32_t end = slots; end < slots + LISTS; end++)
        cache->next[end] = cache->prev[end] = end;
    return 0;
}

static void end_cache(cache_t *cache)
{
    free(cache->next);
    free(cache->prev);
    free(cache->volume_counts);
    free(cache->floored);
}

static int begin_keyed(keyed_t *keyed, int64_t capacity, int64_t ring_max, const sketch_t *sketch)
{
    const uint32_t slots = (uint32_t)(capacity + ring_max) + SETTLE_STEPS_MAX + 3;
    uint64_t size = 16;
    while (size < (uint64_t)slots + slots / 2)
        size *= 2;
    keyed->index_mask = size - 1;
    keyed->index = calloc(size, 4);
    keyed->keys = calloc(slots, 8);
    keyed->fresh = 1;
    keyed->cache.states = calloc(slots, 1);
    keyed->cache.keys = keyed->keys;
    if (begin_cache(&keyed->cache, slots, capacity, sketch) < 0 || !keyed->index || !keyed->keys
        || !keyed->cache.states)
        return -1;
    return 0;
}

static void end_keyed(keyed_t *keyed)
{
    free(keyed->index);
    free(keyed->keys);
    free(keyed->cache.states);
    end_cache(&keyed->cache);
}

/* Get zeros that are read and written at random. In huge pages, where the kernel gives them to who asks: what is not
   in the processor's caches then costs a miss, not a miss and a walk through page tables, which are nested in a guest.
   Memory is taken when it is touched first, in pieces of that size; so small ones go without. */
static int begin_counters(sketch_t *sketch, size_t size)
{
    if (size < HUGE_SIZE_MIN) {
        sketch->counters = calloc(size, 1);
        return sketch->counters == NULL ? -1 : 0;
    }
    const size_t whole = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, mapped = whole + HUGE_PAGE;
    void *memory = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return -1;
    sketch->memory = memory;
    sketch->memory_size = mapped;
    sketch->counters = (uint8_t *)(((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    madvise(sketch->counters, whole, MADV_HUGEPAGE); /* no harm if there are none */
    return 0;
}

static void end_sketch(sketch_t *sketch)
{
    if (sketch->memory != NULL)
        munmap(sketch->memory, sketch->memory_size);
    else
        free(sketch->counters);
}

static int begin_sketch(sketch_t *sketch, int64_t capacity, uint64_t seed)
{
    sketch->width = ((uint64_t)capacity * COUNTERS_PER_BLOCK / ROWS + 15) / 16 * 16;
    sketch->period = (uint64_t)capacity * AGEING_ACCESSES;
    sketch->seed = seed;
    sketch->swept = sketch_words(sketch);
    return begin_counters(sketch, sketch->width * ROWS / 2);
}

/* --- the choice of the window */

static int64_t share_of(int64_t capacity, double share) { return (int64_t)((double)capacity * share + 0.5); }

static void follow_plan(cache_t *cache, int plan)
{
    cache->window_max = share_of(cache->capacity, PLAN_WINDOWS[plan]);
    cache->margin_from = PLAN_MARGIN_FROM[plan];
}

static int begin_chooser(
    chooser_t *chooser, const sketch_t *sketch, int64_t capacity, int64_t ring_max, int64_t entries, double price,
    double window_max)
{
    const int64_t mini = capacity < entries ? capacity : entries;
    chooser->limit = capacity <= entries ? UINT64_MAX : (uint64_t)((double)mini / (double)capacity * 18446744073709551615.0);
    chooser->price = price;
    chooser->until_score = capacity / SCORES_PER_CAPACITY + 1;
    chooser->plan_max = PLANS - 1;
    while (chooser->plan_max > 0 && PLAN_WINDOWS[chooser->plan_max] > window_max)
        chooser->plan_max--;
    chooser->plan = chooser->plan_max < PLAN_AT_START ? chooser->plan_max : PLAN_AT_START;
    for (int plan = 0; plan <= chooser->plan_max; plan++) {
        const int64_t ring = larger(1, share_of(mini, (double)ring_max / (double)capacity));
        if (begin_keyed(&chooser->minis[plan], mini, ring, sketch) < 0)
            return -1;
        chooser->minis[plan].cache.ring_max = ring;
        follow_plan(&chooser->minis[plan].cache, plan);
    }
    return 0;
}

static void end_chooser(chooser_t *chooser)
{
    for (int plan = 0; plan < PLANS; plan++)
        end_keyed(&chooser->minis[plan]);
}

/* Score the plans since the last time; returns whether the best one is another now. */
static int choose(chooser_t *chooser)
{
    if (chooser->minis[0].cache.accesses == 0)
        return 0;
    int best = chooser->plan;
    for (int plan = 0; plan <= chooser->plan_max; plan++) {
        cache_t *cache = &chooser->minis[plan].cache;
        const double value =
            ((double)cache->hits - chooser->price * (double)cache->writes) / (double)cache->accesses;
        chooser->scores[plan] =
            chooser->scored ? chooser->scores[plan] * SCORE_DECAY + value * (1 - SCORE_DECAY) : value;
        cache->hits = cache->writes = cache->accesses = 0;
    }
    chooser->scored = 1;
    for (int plan = 0; plan <= chooser->plan_max; plan++)
        if (chooser->scores[plan] > chooser->scores[best])
            best = plan;
    if (best == chooser->plan || chooser->scores[best] <= chooser->scores[chooser->plan] + SCORE_LEAD)
        return 0;
    chooser->plan = best;
    return 1;
}

/* An access of the whole cache: count it, age, show it to the miniatures. */
static void observe(chooser_t *chooser, sketch_t *sketch, cache_t *whole, uint64_t key, uint64_t hash, int passes)
{
    int halved;
    count_access(sketch, hash, &halved);
    if (halved) {
        halve(whole);
        for (int plan = 0; plan <= chooser->plan_max; plan++)
            halve(&chooser->minis[plan].cache);
    }
    if (hash * MINIATURE_FACTOR <= chooser->limit)
        for (int plan = 0; plan <= chooser->plan_max; plan++)
            access_key(&chooser->minis[plan], key, passes);
    if (--chooser->until_score <= 0) {
        chooser->until_score = whole->capacity / SCORES_PER_CAPACITY + 1;
        if (choose(chooser))
            follow_plan(whole, chooser->plan);
    }
}

#endif
