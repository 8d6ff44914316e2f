/* The native twins of `forebay_cache.engine.policy_core`: `Core` over the places of a device, `Replay` over keys.

   See the twins for what each method does. What Python owns (keys and states of the places) is held as buffers for
   the life of a Core; places are checked against its bounds before anything is read or written. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_policy_core.h"

#define SAMPLED_MAX 8192
#define BLOCKS_AHEAD 32 /* so many blocks' counters are brought at a time */

typedef struct {
    PyObject_HEAD
    cache_t cache;
    sketch_t sketch;
    chooser_t chooser;
    Py_buffer keys, states;
    uint64_t sample_limit, sampled[SAMPLED_MAX];
    uint32_t sampled_count;
    int64_t accesses;
} core_t;

typedef struct {
    PyObject_HEAD
    keyed_t keyed;
    sketch_t sketch;
    chooser_t chooser;
    int is_lru;
    int64_t accesses, entries, group_misses[MISS_GROUPS], bypass, ahead;
    int64_t *volume_hits; /* by volume slot */
    streams_t **streams; /* by volume slot, made when they are needed; keys are positions, so sharing one is no harm */
} replay_t;

typedef struct {
    PyObject_HEAD
    streams_t streams;
} one_streams_t;

typedef struct {
    PyObject_HEAD
    int64_t bypass, ahead;
    streams_t **streams;
} marker_t;

/* --- arguments */

static int number(PyObject *object, uint64_t *into)
{
    *into = PyLong_AsUnsignedLongLong(object);
    return *into == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int numbers(PyObject *const *arguments, Py_ssize_t given, Py_ssize_t count, uint64_t *into)
{
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "%zd arguments were expected", count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (number(arguments[i], &into[i]) < 0)
            return -1;
    return 0;
}

static void *items(PyObject *object, Py_buffer *view, Py_ssize_t *length)
{
    if (PyObject_GetBuffer(object, view, PyBUF_SIMPLE) < 0)
        return NULL;
    if (view->len % 8) {
        PyErr_SetString(PyExc_ValueError, "an array of another item size was expected");
        PyBuffer_Release(view);
        return NULL;
    }
    *length = view->len / 8;
    return view->buf;
}

static int is_place(const core_t *self, uint64_t place, uint64_t count)
{
    if (place > 0 && place <= self->cache.slots && count <= self->cache.slots - place)
        return 1;
    PyErr_SetString(PyExc_ValueError, "a place is outside of the device");
    return 0;
}

/* --- Core: what the engine tells of places */

static void see(core_t *self, uint64_t key, int passes)
{
    const uint64_t hash = hash_of(&self->sketch, key);
    self->accesses++;
    if (sample_hash(key, SAMPLE_SEED) < self->sample_limit && self->sampled_count < SAMPLED_MAX)
        self->sampled[self->sampled_count++] = passes ? key | PASSES : key;
    observe(&self->chooser, &self->sketch, &self->cache, key, hash, passes);
    sweep(&self->cache);
}

/* The counters of blocks lie scattered. Have the processor bring those of the next BLOCKS_AHEAD blocks of `count`: loads
   that nobody waits for go on side by side. Prefetches were no help in a guest (2026-11, EPYC: 0.37 us per block of a
   large write, 0.24 with loads), where most of them miss the TLB too. */
static void bring_counters(const core_t *self, const uint64_t *keys, uint64_t count)
{
    for (uint64_t i = 0; i < count && i < BLOCKS_AHEAD; i++) {
        const uint64_t hash = hash_of(&self->sketch, keys[i]);
        for (int row = 0; row < ROWS; row++)
            (void)*(const volatile uint8_t *)&self->sketch.counters[counter_at(&self->sketch, hash, row) >> 1];
    }
}

static void use(core_t *self, uint32_t place)
{
    see(self, self->cache.keys[place], 0);
    if (region_of(&self->cache, place) >= WINDOW)
        touch(&self->cache, place, NULL);
    else
        enter(&self->cache, place);
}

static void forget(core_t *self, uint32_t place)
{
    if (region_of(&self->cache, place) >= WINDOW)
        take_out(&self->cache, place);
    self->cache.states[place] = 0;
}

/* The block of one place lies at another one from now on, with all that is known of it. */
static void transplant(core_t *self, uint32_t source, uint32_t target)
{
    cache_t *cache = &self->cache;
    if (region_of(cache, target) >= WINDOW)
        take_out(cache, target);
    const int region = region_of(cache, source);
    set_state(cache, target, region ? region : OUTSIDE, bucket_of(cache, source));
    if (region >= WINDOW) {
        cache->next[target] = cache->next[source];
        cache->prev[target] = cache->prev[source];
        cache->next[cache->prev[target]] = target;
        cache->prev[cache->next[target]] = target;
    }
    cache->states[source] = 0;
}

static PyObject *core_hit(core_t *self, PyObject *argument)
{
    uint64_t place;
    if (number(argument, &place) < 0 || !is_place(self, place, 1))
        return NULL;
    use(self, (uint32_t)place);
    Py_RETURN_NONE;
}

static PyObject *core_hit_run(core_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    uint64_t n[2];
    if (numbers(arguments, given, 2, n) < 0 || !is_place(self, n[0], n[1]))
        return NULL;
    for (uint64_t i = 0; i < n[1]; i++) {
        if (i % BLOCKS_AHEAD == 0)
            bring_counters(self, self->cache.keys + n[0] + i, n[1] - i);
        use(self, (uint32_t)(n[0] + i));
    }
    Py_RETURN_NONE;
}

static PyObject *core_removed(core_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    if (given != 2 || number(arguments[1], &self->cache.volume_of_zero) < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "2 arguments were expected");
        return NULL;
    }
    Py_buffer view;
    Py_ssize_t count;
    const int64_t *places = items(arguments[0], &view, &count);
    if (places == NULL)
        return NULL;
    int fits = 1;
    for (Py_ssize_t i = 0; i < count && fits; i++)
        fits = is_place(self, (uint64_t)places[i], 1);
    for (Py_ssize_t i = 0; i < count && fits; i++)
        forget(self, (uint32_t)places[i]);
    PyBuffer_Release(&view);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyObject *core_missed(core_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    uint64_t n[3];
    if (numbers(arguments, given, 3, n) < 0)
        return NULL;
    for (uint64_t i = 0; i < n[1]; i++)
        see(self, n[0] + i, n[2] != 0);
    Py_RETURN_NONE;
}

static PyObject *core_admits(core_t *self, PyObject *argument)
{
    uint64_t key;
    if (number(argument, &key) < 0)
        return NULL;
    const int count = frequency(&self->sketch, hash_of(&self->sketch, key));
    return PyBool_FromLong(admits(&self->cache, count, (key >> LBA_BITS) % VOLUME_SLOTS));
}

static PyObject *core_passes_over(core_t *self, PyObject *argument)
{
    uint64_t key;
    if (number(argument, &key) < 0)
        return NULL;
    return PyBool_FromLong(passes_over(&self->cache, frequency(&self->sketch, hash_of(&self->sketch, key))));
}

static PyObject *core_frequency(core_t *self, PyObject *argument)
{
    uint64_t key;
    if (number(argument, &key) < 0)
        return NULL;
    return PyLong_FromLong(frequency(&self->sketch, hash_of(&self->sketch, key)));
}

static PyObject *core_entered(core_t *self, PyObject *argument)
{
    uint64_t place;
    if (number(argument, &place) < 0 || !is_place(self, place, 1))
        return NULL;
    if (region_of(&self->cache, (uint32_t)place) < WINDOW) {
        self->cache.writes++;
        enter(&self->cache, (uint32_t)place);
    }
    Py_RETURN_NONE;
}

static PyObject *core_moved(core_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    Py_buffer held[2];
    Py_ssize_t source_count = 0, target_count = 0;
    if (given != 2) {
        PyErr_SetString(PyExc_TypeError, "2 arguments were expected");
        return NULL;
    }
    const int64_t *sources = items(arguments[0], &held[0], &source_count);
    if (sources == NULL)
        return NULL;
    const int64_t *targets = items(arguments[1], &held[1], &target_count);
    if (targets == NULL) {
        PyBuffer_Release(&held[0]);
        return NULL;
    }
    int fits = source_count == target_count;
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
    for (Py_ssize_t i = 0; i < source_count && fits; i++)
        fits = is_place(self, (uint64_t)sources[i], 1) && is_place(self, (uint64_t)targets[i], 1);
    for (Py_ssize_t i = 0; i < source_count && fits; i++)
        if (sources[i] != targets[i])
            transplant(self, (uint32_t)sources[i], (uint32_t)targets[i]);
    PyBuffer_Release(&held[0]);
    PyBuffer_Release(&held[1]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static void write_block(core_t *self, uint32_t place, int64_t old, uint64_t key)
{
    self->cache.volume_of_zero = key >> LBA_BITS;
    see(self, key, 0);
    if (old >= 0)
        transplant(self, (uint32_t)old, place);
    if (region_of(&self->cache, place) >= WINDOW) {
        touch(&self->cache, place, NULL);
    } else {
        self->cache.writes += old < 0;
        enter(&self->cache, place);
    }
}

static PyObject *core_written(core_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    Py_buffer held[3];
    void *arrays[3];
    Py_ssize_t sizes[3];
    uint64_t count;
    int got = 0, fits;
    if (given != 4) {
        PyErr_SetString(PyExc_TypeError, "4 arguments were expected");
        return NULL;
    }
    fits = number(arguments[3], &count) == 0;
    while (fits && got < 3) {
        arrays[got] = items(arguments[got], &held[got], &sizes[got]);
        if ((fits = arrays[got] != NULL) && count > (uint64_t)sizes[got++]) {
            PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
            fits = 0;
        }
    }
    const int64_t *const places = arrays[0], *const olds = arrays[1];
    const uint64_t *const keys = arrays[2];
    for (uint64_t i = 0; fits && i < count; i++)
        fits = is_place(self, (uint64_t)places[i], 1) && (olds[i] < 0 || is_place(self, (uint64_t)olds[i], 1));
    for (uint64_t i = 0; fits && i < count; i++) {
        if (i % BLOCKS_AHEAD == 0)
            bring_counters(self, keys + i, count - i);
        write_block(self, (uint32_t)places[i], olds[i], keys[i]);
    }
    while (got)
        PyBuffer_Release(&held[--got]);
    return fits ? Py_NewRef(Py_None) : NULL;
}

/* A place comes back with the state that a checkpoint tells; one without a region was used since. A place whose state
   is known already keeps it, but its block counts as used that often. */
static void restore_place(core_t *self, uint32_t place, uint8_t state)
{
    cache_t *cache = &self->cache;
    if (state == 0)
        return;
    int bucket = state & COUNT_MASK;
    bucket = bucket > COUNT_MAX ? COUNT_MAX : bucket;
    const int region = state >> REGION_SHIFT, is_kept = region != OUTSIDE && cache->count < cache->capacity;
    if (is_kept)
        raise_to(&self->sketch, hash_of(&self->sketch, cache->keys[place]), bucket > 1 ? bucket : 1);
    if (cache->states[place] != 0)
        return;
    if (is_kept)
        put_in(cache, place, region == MAIN ? MAIN : WINDOW, bucket);
    else
        set_state(cache, place, OUTSIDE, 0);
}

static PyObject *core_restore(core_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    Py_buffer view;
    uint64_t first;
    if (given != 2) {
        PyErr_SetString(PyExc_TypeError, "2 arguments were expected");
        return NULL;
    }
    if (number(arguments[0], &first) < 0 || PyObject_GetBuffer(arguments[1], &view, PyBUF_SIMPLE) < 0)
        return NULL;
    const int fits = first + (uint64_t)view.len <= self->cache.slots;
    for (Py_ssize_t i = 0; i < view.len && fits; i++)
        if (first + (uint64_t)i > 0)
            restore_place(self, (uint32_t)(first + (uint64_t)i), ((const uint8_t *)view.buf)[i]);
    PyBuffer_Release(&view);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "a place is outside of the device");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *core_follow(core_t *self, PyObject *argument)
{
    uint64_t plan;
    if (number(argument, &plan) < 0)
        return NULL;
    if (plan > (uint64_t)self->chooser.plan_max) {
        PyErr_SetString(PyExc_ValueError, "there is no such plan");
        return NULL;
    }
    self->chooser.plan = (int)plan;
    follow_plan(&self->cache, (int)plan);
    Py_RETURN_NONE;
}

static PyObject *core_set_floor(core_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    Py_buffer view;
    Py_ssize_t count;
    uint64_t floor;
    if (given != 2) {
        PyErr_SetString(PyExc_TypeError, "2 arguments were expected");
        return NULL;
    }
    const int64_t *volumes = number(arguments[0], &floor) < 0 ? NULL : items(arguments[1], &view, &count);
    if (volumes == NULL)
        return NULL;
    memset(self->cache.floored, 0, VOLUME_SLOTS);
    for (Py_ssize_t i = 0; i < count; i++)
        self->cache.floored[(uint64_t)volumes[i] % VOLUME_SLOTS] = 1;
    self->cache.floor = (int64_t)floor;
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *core_take_sample(core_t *self, PyObject *argument)
{
    if (number(argument, &self->sample_limit) < 0)
        return NULL;
    PyObject *answer = PyBytes_FromStringAndSize((const char *)self->sampled, 8 * (Py_ssize_t)self->sampled_count);
    self->sampled_count = 0;
    return answer;
}

static PyObject *figures_of(const cache_t *cache, const chooser_t *chooser, int64_t accesses)
{
    return Py_BuildValue(
        "{sL sL sL sL sL sL si}", "accesses", (long long)accesses, "hits", (long long)cache->hits, "writes",
        (long long)cache->writes, "count", (long long)cache->count, "window_count", (long long)cache->window_count,
        "window_max", (long long)cache->window_max, "plan", chooser->plan);
}

static PyObject *core_figures(core_t *self, PyObject *nothing)
{
    (void)nothing;
    return figures_of(&self->cache, &self->chooser, self->accesses);
}

static PyObject *blocks_in(const cache_t *cache, int as_keys)
{
    PyObject *answer = PyList_New(0);
    for (int list = 0; answer != NULL && list < LISTS; list++) {
        PyObject *one = PyList_New(0);
        for (uint32_t slot = oldest(cache, list); one && slot && slot < cache->slots; slot = cache->next[slot]) {
            PyObject *name = PyLong_FromUnsignedLongLong(as_keys ? cache->keys[slot] : slot);
            if (name == NULL || PyList_Append(one, name) < 0)
                Py_CLEAR(one);
            Py_XDECREF(name);
        }
        if (one == NULL || PyList_Append(answer, one) < 0)
            Py_CLEAR(answer);
        Py_XDECREF(one);
    }
    return answer;
}

static PyObject *core_blocks(core_t *self, PyObject *nothing)
{
    (void)nothing;
    return blocks_in(&self->cache, 0);
}

static void core_free(core_t *self)
{
    PyTypeObject *type = Py_TYPE(self);
    end_cache(&self->cache);
    end_chooser(&self->chooser);
    end_sketch(&self->sketch);
    PyBuffer_Release(&self->keys);
    PyBuffer_Release(&self->states);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    PyObject *keys, *states;
    unsigned long long places, capacity, ring_max, entries, seed;
    double price, window_max;
    (void)named;
    if (!PyArg_ParseTuple(
            arguments, "KKOOKKKdd", &places, &capacity, &keys, &states, &ring_max, &entries, &seed, &price, &window_max))
        return NULL;
    core_t *self = (core_t *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (PyObject_GetBuffer(keys, &self->keys, PyBUF_SIMPLE) < 0
        || PyObject_GetBuffer(states, &self->states, PyBUF_WRITABLE) < 0)
        goto failed;
    if (places < 1 || places > 0xFFFFFF00u || capacity < 1 || capacity > places || ring_max > capacity || entries < 1
        || entries > 0xFFFFFF || (uint64_t)self->keys.len != 8 * places || (uint64_t)self->states.len != places) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
        goto failed;
    }
    self->cache.keys = self->keys.buf;
    self->cache.states = self->states.buf;
    self->cache.volume_counts = calloc(VOLUME_SLOTS, 8);
    self->cache.floored = calloc(VOLUME_SLOTS, 1);
    if (begin_cache(&self->cache, (uint32_t)places, (int64_t)capacity, &self->sketch) < 0
        || begin_sketch(&self->sketch, (int64_t)capacity, seed) < 0
        || begin_chooser(&self->chooser, &self->sketch, (int64_t)capacity, (int64_t)ring_max, (int64_t)entries, price,
                         window_max) < 0
        || self->cache.volume_counts == NULL || self->cache.floored == NULL) {
        PyErr_NoMemory();
        goto failed;
    }
    follow_plan(&self->cache, self->chooser.plan);
    return (PyObject *)self;
failed:
    Py_DECREF(self);
    return NULL;
}

/* --- requests and their streams */

typedef struct {
    Py_buffer held[3];
    const uint64_t *firsts, *counts;
    const uint8_t *writes;
    Py_ssize_t count;
} requests_t;

static void drop_requests(requests_t *requests)
{
    for (int i = 0; i < 3; i++)
        PyBuffer_Release(&requests->held[i]);
}

static int take_requests(PyObject *const *arguments, Py_ssize_t given, requests_t *requests)
{
    Py_ssize_t counts = 0;
    memset(requests, 0, sizeof *requests);
    if (given != 3) {
        PyErr_SetString(PyExc_TypeError, "3 arguments were expected");
        return -1;
    }
    requests->firsts = items(arguments[0], &requests->held[0], &requests->count);
    requests->counts = requests->firsts ? items(arguments[1], &requests->held[1], &counts) : NULL;
    if (requests->counts && PyObject_GetBuffer(arguments[2], &requests->held[2], PyBUF_SIMPLE) == 0) {
        requests->writes = requests->held[2].buf;
        if (counts == requests->count && requests->held[2].len == counts)
            return 0;
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
    }
    drop_requests(requests);
    return -1;
}

static streams_t *streams_of(streams_t ***table, uint64_t key)
{
    if (*table == NULL && (*table = calloc(VOLUME_SLOTS, sizeof(streams_t *))) == NULL)
        return NULL;
    streams_t **slot = &(*table)[(key >> LBA_BITS) % VOLUME_SLOTS];
    if (*slot == NULL)
        *slot = calloc(1, sizeof(streams_t));
    return *slot;
}

static void end_streams(streams_t **by_slot)
{
    for (int slot = 0; by_slot != NULL && slot < VOLUME_SLOTS; slot++)
        free(by_slot[slot]);
    free(by_slot);
}

/* --- Replay: a whole cache by keys */

/* One access; returns whether the store had to bring the block. */
static int replay_key(replay_t *self, uint64_t key, int passes)
{
    cache_t *cache = &self->keyed.cache;
    self->accesses++;
    const uint64_t hash = hash_of(&self->sketch, key);
    if (!self->is_lru) {
        observe(&self->chooser, &self->sketch, cache, key, hash, passes);
        const uint64_t volume = (key >> LBA_BITS) % VOLUME_SLOTS;
        if (!cache->floored[volume]) {
            cache->floored[volume] = 1;
            self->entries++;
            cache->floor = self->entries > 1 ? cache->capacity / (2 * self->entries) : 0;
        }
    }
    const int outcome = access_key(&self->keyed, key, passes && !self->is_lru);
    if (outcome != MISSED)
        self->volume_hits[(key >> LBA_BITS) % VOLUME_SLOTS]++;
    else
        self->group_misses[hash % MISS_GROUPS]++;
    return outcome != HIT;
}

/* One request; returns -1 if there is no memory. */
static int replay_request(replay_t *self, uint64_t first, uint64_t count, int is_write)
{
    const int64_t start = (int64_t)first, end = start + (int64_t)count;
    int64_t missed = 0, ahead;
    if (is_write || self->is_lru) {
        for (uint64_t i = 0; i < count; i++)
            replay_key(self, first + i, 0);
        return 0;
    }
    streams_t *streams = streams_of(&self->streams, first);
    if (streams == NULL)
        return -1;
    const int found = find_stream(streams, start, end);
    const int passes = self->bypass && missed_of(streams, found) > self->bypass;
    for (uint64_t i = 0; i < count; i++)
        missed += replay_key(self, first + i, passes);
    if (missed)
        read_stream(streams, found, start, end, missed, self->ahead, &ahead);
    return 0;
}

static PyObject *replay_feed(replay_t *self, PyObject *array)
{
    Py_buffer view;
    Py_ssize_t count;
    const uint64_t *keys = items(array, &view, &count);
    if (keys == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        replay_key(self, keys[i] & ~PASSES, (keys[i] & PASSES) != 0);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *replay_feed_requests(replay_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    requests_t requests;
    int failed = 0;
    if (take_requests(arguments, given, &requests) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < requests.count && !failed; i++)
        failed = replay_request(self, requests.firsts[i] & ~PASSES, requests.counts[i], requests.writes[i]) < 0;
    Py_END_ALLOW_THREADS
    drop_requests(&requests);
    return failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

static PyObject *replay_volume_hits(replay_t *self, PyObject *nothing)
{
    (void)nothing;
    return PyBytes_FromStringAndSize((const char *)self->volume_hits, VOLUME_SLOTS * 8);
}

static PyObject *replay_group_misses(replay_t *self, PyObject *nothing)
{
    (void)nothing;
    return PyBytes_FromStringAndSize((const char *)self->group_misses, sizeof self->group_misses);
}

static PyObject *replay_holds(replay_t *self, PyObject *array)
{
    Py_buffer view;
    Py_ssize_t count;
    const uint64_t *keys = items(array, &view, &count);
    if (keys == NULL)
        return NULL;
    PyObject *answer = PyBytes_FromStringAndSize(NULL, count);
    for (Py_ssize_t i = 0; i < count && answer != NULL; i++)
        PyBytes_AS_STRING(answer)[i] = find_slot(&self->keyed, keys[i]) != 0;
    PyBuffer_Release(&view);
    return answer;
}

static PyObject *replay_figures(replay_t *self, PyObject *nothing)
{
    (void)nothing;
    return figures_of(&self->keyed.cache, &self->chooser, self->accesses);
}

static PyObject *replay_blocks(replay_t *self, PyObject *nothing)
{
    (void)nothing;
    return blocks_in(&self->keyed.cache, 1);
}

static void replay_free(replay_t *self)
{
    PyTypeObject *type = Py_TYPE(self);
    end_keyed(&self->keyed);
    end_chooser(&self->chooser);
    end_sketch(&self->sketch);
    end_streams(self->streams);
    free(self->volume_hits);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *replay_new(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    unsigned long long capacity, ring_max, entries, seed, bypass, ahead;
    double price, window_max;
    int is_lru;
    (void)named;
    if (!PyArg_ParseTuple(
            arguments, "KKKKddKKp", &capacity, &ring_max, &entries, &seed, &price, &window_max, &bypass, &ahead, &is_lru))
        return NULL;
    if (capacity < 1 || capacity > 0xF0000000u || ring_max > capacity || entries < 1 || entries > 0xFFFFFF) {
        PyErr_SetString(PyExc_ValueError, "no cache has this size");
        return NULL;
    }
    replay_t *self = (replay_t *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    cache_t *cache = &self->keyed.cache;
    self->is_lru = is_lru;
    ring_max = ring_max > 0 || is_lru ? ring_max : 1;
    self->bypass = (int64_t)bypass;
    self->ahead = (int64_t)ahead;
    self->volume_hits = calloc(VOLUME_SLOTS, 8);
    int failed = begin_keyed(&self->keyed, (int64_t)capacity, (int64_t)ring_max, &self->sketch) < 0
        || self->volume_hits == NULL;
    if (is_lru) {
        cache->window_max = (int64_t)capacity;
    } else if (!failed) {
        cache->ring_max = (int64_t)ring_max;
        cache->volume_counts = calloc(VOLUME_SLOTS, 8);
        cache->floored = calloc(VOLUME_SLOTS, 1);
        failed = cache->volume_counts == NULL || cache->floored == NULL
            || begin_sketch(&self->sketch, (int64_t)capacity, seed) < 0
            || begin_chooser(&self->chooser, &self->sketch, (int64_t)capacity, cache->ring_max, (int64_t)entries, price,
                             window_max) < 0;
        follow_plan(cache, self->chooser.plan);
    }
    self->sketch.seed = seed;
    self->entries = 0;
    if (failed) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

/* --- Streams: those of one volume, for the engine */

static PyObject *streams_missed_before(one_streams_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    uint64_t n[2];
    if (numbers(arguments, given, 2, n) < 0)
        return NULL;
    const int found = find_stream(&self->streams, (int64_t)n[0], (int64_t)(n[0] + n[1]));
    return PyLong_FromLongLong(missed_of(&self->streams, found));
}

static PyObject *streams_read(one_streams_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    uint64_t n[4];
    int64_t ahead;
    if (numbers(arguments, given, 4, n) < 0)
        return NULL;
    const int64_t start = (int64_t)n[0], end = (int64_t)(n[0] + n[1]);
    const int found = find_stream(&self->streams, start, end);
    const int64_t count = read_stream(&self->streams, found, start, end, (int64_t)n[2], (int64_t)n[3], &ahead);
    if (count == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(LL)", (long long)ahead, (long long)count);
}

static void plain_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* --- Marker: which requests are part of a long stream, where nothing is cached */

static PyObject *marker_new(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    unsigned long long bypass, ahead;
    (void)named;
    if (!PyArg_ParseTuple(arguments, "KK", &bypass, &ahead))
        return NULL;
    marker_t *self = (marker_t *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->bypass = (int64_t)bypass;
        self->ahead = (int64_t)ahead;
    }
    return (PyObject *)self;
}

static void marker_free(marker_t *self)
{
    end_streams(self->streams);
    plain_free((PyObject *)self);
}

static PyObject *marker_mark(marker_t *self, PyObject *const *arguments, Py_ssize_t given)
{
    requests_t requests;
    if (take_requests(arguments, given, &requests) < 0)
        return NULL;
    PyObject *answer = PyBytes_FromStringAndSize(NULL, 8 * requests.count);
    uint64_t *marked = answer ? (uint64_t *)PyBytes_AS_STRING(answer) : NULL;
    for (Py_ssize_t i = 0; i < requests.count && marked; i++) {
        const int64_t start = (int64_t)requests.firsts[i], count = (int64_t)requests.counts[i];
        int64_t ahead;
        marked[i] = requests.firsts[i];
        if (requests.writes[i])
            continue;
        streams_t *streams = streams_of(&self->streams, requests.firsts[i]);
        if (streams == NULL) {
            Py_CLEAR(answer);
            PyErr_NoMemory();
            break;
        }
        const int found = find_stream(streams, start, start + count);
        if (self->bypass && missed_of(streams, found) > self->bypass)
            marked[i] |= PASSES;
        read_stream(streams, found, start, start + count, count, self->ahead, &ahead);
    }
    drop_requests(&requests);
    return answer;
}

/* --- sampling */

/* Write the keys of runs of blocks to `into` whose sample hash is below the limit; return how many, and all blocks. */
static PyObject *sample_runs(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    Py_buffer held[3];
    Py_ssize_t length[3];
    void *arrays[3];
    uint64_t n[2];
    int count = 0;
    PyObject *answer = NULL;
    (void)module;
    if (given != 5) {
        PyErr_SetString(PyExc_TypeError, "5 arguments were expected");
        return NULL;
    }
    while (count < 3 && (arrays[count] = items(arguments[count], &held[count], &length[count])) != NULL)
        count++;
    if (count < 3 || numbers(arguments + 3, 2, 2, n) < 0)
        goto end;
    const uint64_t *firsts = arrays[0], *counts = arrays[1];
    uint64_t *into = arrays[2], total = 0, taken = 0;
    if (length[0] != length[1] || held[2].readonly) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
        goto end;
    }
    Py_ssize_t run = 0;
    for (; run < length[0] && counts[run] <= (uint64_t)length[2] - taken; run++) {
        total += counts[run];
        for (uint64_t key = firsts[run]; key < firsts[run] + counts[run]; key++) {
            into[taken] = key;
            taken += sample_hash(key, n[1]) < n[0];
        }
    }
    answer = Py_BuildValue("(nKK)", run, (unsigned long long)taken, (unsigned long long)total);
end:
    while (count)
        PyBuffer_Release(&held[--count]);
    return answer;
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL
#define ONE(function) (PyCFunction)(void (*)(void))function, METH_O, NULL
#define NONE(function) (PyCFunction)(void (*)(void))function, METH_NOARGS, NULL

static PyMethodDef core_methods[] = {
    {"hit", ONE(core_hit)}, {"hit_run", FAST(core_hit_run)}, {"missed", FAST(core_missed)},
    {"admits", ONE(core_admits)}, {"passes_over", ONE(core_passes_over)}, {"frequency", ONE(core_frequency)}, {"entered", ONE(core_entered)},
    {"moved", FAST(core_moved)}, {"written", FAST(core_written)}, {"removed", FAST(core_removed)},
    {"restore", FAST(core_restore)}, {"follow", ONE(core_follow)}, {"set_floor", FAST(core_set_floor)},
    {"take_sample", ONE(core_take_sample)}, {"figures", NONE(core_figures)}, {"blocks", NONE(core_blocks)},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef replay_methods[] = {
    {"feed", ONE(replay_feed)}, {"feed_requests", FAST(replay_feed_requests)}, {"holds", ONE(replay_holds)}, {"volume_hits", NONE(replay_volume_hits)},
    {"group_misses", NONE(replay_group_misses)}, {"figures", NONE(replay_figures)},
    {"blocks", NONE(replay_blocks)}, {NULL, NULL, 0, NULL},
};

static PyMethodDef streams_methods[] = {
    {"missed_before", FAST(streams_missed_before)}, {"read", FAST(streams_read)}, {NULL, NULL, 0, NULL},
};

static PyMethodDef marker_methods[] = {{"mark", FAST(marker_mark)}, {NULL, NULL, 0, NULL}};

static PyType_Slot core_slots[] = {
    {Py_tp_new, core_new}, {Py_tp_dealloc, core_free}, {Py_tp_methods, core_methods}, {0, NULL}};
static PyType_Slot replay_slots[] = {
    {Py_tp_new, replay_new}, {Py_tp_dealloc, replay_free}, {Py_tp_methods, replay_methods}, {0, NULL}};
static PyType_Slot streams_slots[] = {{Py_tp_dealloc, plain_free}, {Py_tp_methods, streams_methods}, {0, NULL}};
static PyType_Slot marker_slots[] = {
    {Py_tp_new, marker_new}, {Py_tp_dealloc, marker_free}, {Py_tp_methods, marker_methods}, {0, NULL}};
static PyType_Spec core_spec = {"forebay_cache._policy.Core", sizeof(core_t), 0, Py_TPFLAGS_DEFAULT, core_slots};
static PyType_Spec replay_spec = {
    "forebay_cache._policy.Replay", sizeof(replay_t), 0, Py_TPFLAGS_DEFAULT, replay_slots};

static PyType_Spec streams_spec = {
    "forebay_cache._policy.Streams", sizeof(one_streams_t), 0, Py_TPFLAGS_DEFAULT, streams_slots};
static PyType_Spec marker_spec = {
    "forebay_cache._policy.Marker", sizeof(marker_t), 0, Py_TPFLAGS_DEFAULT, marker_slots};

static PyMethodDef functions[] = {{"sample_runs", FAST(sample_runs)}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "forebay_cache._policy", .m_size = -1, .m_methods = functions,
};

static int add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
    PyObject *type = PyType_FromSpec(spec);
    const int failed = type == NULL || PyModule_AddObjectRef(module, name, type) < 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

PyMODINIT_FUNC PyInit__policy(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL
        && (add_type(module, "Core", &core_spec) < 0 || add_type(module, "Replay", &replay_spec) < 0
            || add_type(module, "Streams", &streams_spec) < 0 || add_type(module, "Marker", &marker_spec) < 0))
        Py_CLEAR(module);
    return module;
}
