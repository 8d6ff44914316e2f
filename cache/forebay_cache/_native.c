/* The native twins of `forebay_cache.engine.entering` and `forebay_cache.engine.emptying`, of `find_runs` in
   `forebay_cache.engine.runs`, and of `put_writes` and `mark_written` in `forebay_cache.format.record`: see there what
   each function does, takes and returns.

   Everything lies in arrays that Python owns; here they are only read and written, with their bounds checked first.
   A chain that leads out of the map would be a bug of ours, so it raises SystemError instead of crashing the daemon. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define NIL 0u /* place 0 is a record's header, never a block */
#define UNLINKED 0xFFFFFFFEu
#define LBA_BITS 40
#define ENTRY_SIZE 32
#define BLOCK_ENTRIES (4096 / ENTRY_SIZE)
#define ENTRIES_INDEX 3 /* the fixed fields of a record take the room of so many entries */
#define ENTRIES_MAX (BLOCK_ENTRIES - ENTRIES_INDEX)
#define WRITE 1
#define KEY_SLOTS 256

typedef struct {
    uint64_t lba, version, checksum;
    uint32_t volume_key;
    uint8_t kind, flags, sector_mask, reserved;
} entry_t;

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian; elsewhere the twin does the work");
_Static_assert(ENTRIES_MAX < KEY_SLOTS, "a slot is always free");
_Static_assert(sizeof(entry_t) == ENTRY_SIZE, "an entry has 32 bytes");

typedef struct {
    Py_buffer views[16];
    int count;
} buffers_t;

static void release(buffers_t *held)
{
    while (held->count)
        PyBuffer_Release(&held->views[--held->count]);
}

/* Get the items of an array; NULL with an exception set, what was got before is still held. */
static void *items(buffers_t *held, PyObject *object, int writable, Py_ssize_t size, Py_ssize_t *length)
{
    Py_buffer *view = &held->views[held->count];
    if (PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
        return NULL;
    held->count++;
    if (view->len % size) {
        PyErr_SetString(PyExc_ValueError, "an array of another item size was expected");
        return NULL;
    }
    *length = view->len / size;
    return view->buf;
}

typedef struct {
    uint32_t *heads, *nexts;
    uint64_t *keys, *versions, *sums;
    uint16_t *live;
    Py_ssize_t head_count, place_count, key_count, version_count, sum_count, live_count;
} map_t;

static int numbers(PyObject *const *arguments, int count, uint64_t *into)
{
    for (int i = 0; i < count; i++) {
        into[i] = PyLong_AsUnsignedLongLong(arguments[i]);
        if (into[i] == (uint64_t)-1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* Get the arrays of a map: its six views, see `BlockMap`. */
static int open_map(buffers_t *held, PyObject *views, map_t *map)
{
    map->heads = items(held, PyTuple_GET_ITEM(views, 0), 1, 4, &map->head_count);
    map->nexts = map->heads ? items(held, PyTuple_GET_ITEM(views, 1), 1, 4, &map->place_count) : NULL;
    map->keys = map->nexts ? items(held, PyTuple_GET_ITEM(views, 2), 1, 8, &map->key_count) : NULL;
    map->versions = map->keys ? items(held, PyTuple_GET_ITEM(views, 3), 1, 8, &map->version_count) : NULL;
    map->sums = map->versions ? items(held, PyTuple_GET_ITEM(views, 4), 1, 8, &map->sum_count) : NULL;
    map->live = map->sums ? items(held, PyTuple_GET_ITEM(views, 5), 1, 2, &map->live_count) : NULL;
    return map->live == NULL ? -1 : 0;
}

/* Tell whether the arrays of a map fit each other, and so many places from one on are in it. */
static int takes(const map_t *map, uint64_t zone_blocks, uint64_t first_place, uint64_t count)
{
    const uint64_t places = (uint64_t)map->place_count;
    return zone_blocks > 0 && map->head_count > 0 && map->key_count == map->place_count
        && map->version_count == map->place_count && map->sum_count == map->place_count
        && (uint64_t)map->live_count * zone_blocks >= places && count <= places && first_place <= places - count
        && (first_place != NIL || count == 0);
}

/* Return the link of a chain that leads to a place, or NULL with an exception set if none does. */
static uint32_t *link_to(uint32_t *link, uint32_t *nexts, Py_ssize_t place_count, uint32_t place)
{
    for (Py_ssize_t steps = 0; *link != place && *link != NIL && *link < (uint64_t)place_count; steps++) {
        if (steps == place_count)
            break; /* it runs in a circle */
        link = &nexts[*link];
    }
    if (*link == place && place != NIL)
        return link;
    PyErr_Format(PyExc_SystemError, "the map is damaged at place %u", (unsigned)place);
    return NULL;
}

/* Get the entries of one of the header blocks of a list; NULL with an exception set. Released with `view`. */
static const char *entries_of(PyObject *headers, uint64_t number, Py_buffer *view)
{
    if (PyObject_GetBuffer(PyList_GET_ITEM(headers, (Py_ssize_t)number), view, PyBUF_SIMPLE) < 0)
        return NULL;
    if (view->len == ENTRY_SIZE * BLOCK_ENTRIES)
        return (const char *)view->buf + ENTRIES_INDEX * ENTRY_SIZE;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "a header is not one block");
    return NULL;
}

static PyObject *enter_writes(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    buffers_t held = {.count = 0};
    Py_buffer header;
    Py_ssize_t room[6] = {0};
    uint64_t n[8], *out[6];
    const char *packed = NULL;
    PyObject *answer = NULL;
    (void)module;
    if (given != 11 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != 6
        || !PyList_Check(arguments[2]) || !PyTuple_Check(arguments[10]) || PyTuple_GET_SIZE(arguments[10]) != 6) {
        PyErr_SetString(PyExc_TypeError, "enter_writes takes 11 arguments: tuples of 6 first and last, the third a list");
        return NULL;
    }
    PyObject *const headers = arguments[2], *const found = arguments[10];
    map_t map;
    int fits = open_map(&held, arguments[0], &map) == 0;
    for (int i = 0; i < 6 && fits; i++)
        fits = (out[i] = items(&held, PyTuple_GET_ITEM(found, i), 1, 8, &room[i])) != NULL;
    if (!fits || numbers(arguments + 1, 1, n) < 0 || numbers(arguments + 3, 7, n + 1) < 0)
        goto end;
    const uint64_t zone_blocks = n[0], record_blocks = n[1], count = n[4], first_place = n[5];
    const uint64_t acknowledged = n[6], closed = n[7], records = (uint64_t)PyList_GET_SIZE(headers);
    uint64_t number = n[2], index = n[3], place = first_place;
    for (int i = 0; i < 6; i++)
        fits = fits && count <= (uint64_t)room[i];
    if (fits && count) {
        fits = index < record_blocks && record_blocks <= ENTRIES_MAX && number < records;
        const uint64_t further = fits ? (index + count - 1) / record_blocks : 0;
        fits = fits && further < records - number && takes(&map, zone_blocks, first_place, count + further);
    }
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or the entries do not fit them");
        goto end;
    }
    uint64_t dirty_count = 0, pinned_count = 0;
    for (uint64_t i = 0; i < count; i++, index++, place++) {
        if (index == record_blocks) {
            PyBuffer_Release(&header);
            packed = NULL;
            index = 0;
            number++;
            place++;
        }
        if (packed == NULL && (packed = entries_of(headers, number, &header)) == NULL)
            goto end;
        entry_t entry;
        memcpy(&entry, packed + index * ENTRY_SIZE, ENTRY_SIZE);
        const uint64_t key = (uint64_t)entry.volume_key << LBA_BITS | entry.lba;
        uint32_t *link = &map.heads[key % (uint64_t)map.head_count];
        uint32_t *const head = link;
        for (Py_ssize_t steps = 0; *link != NIL && *link < (uint64_t)map.place_count && map.keys[*link] != key; steps++) {
            if (steps == map.place_count)
                break; /* it runs in a circle */
            link = &map.nexts[*link];
        }
        const uint32_t old = *link;
        if (old >= (uint64_t)map.place_count || (old != NIL && map.keys[old] != key) || map.keys[place] != 0) {
            PyErr_Format(PyExc_SystemError, "the map is damaged at place %u", (unsigned)place);
            goto end;
        }
        out[0][i] = key;
        out[1][i] = place;
        out[2][i] = old == NIL ? (uint64_t)-1 : old;
        if (old == NIL) {
            map.nexts[place] = *head;
            *head = (uint32_t)place;
        } else {
            map.nexts[place] = map.nexts[old];
            *link = (uint32_t)place;
            map.nexts[old] = UNLINKED;
            map.live[old / zone_blocks]--;
            if (map.versions[old] > acknowledged && map.versions[old] <= closed) {
                out[4][pinned_count] = entry.lba;
                out[5][pinned_count++] = old;
            } else {
                map.keys[old] = 0;
            }
        }
        if (old == NIL || map.versions[old] <= closed)
            out[3][dirty_count++] = entry.lba;
        map.keys[place] = key;
        map.versions[place] = entry.version;
        map.sums[place] = entry.checksum;
        map.live[place / zone_blocks]++;
    }
    answer = Py_BuildValue("(KK)", (unsigned long long)dirty_count, (unsigned long long)pinned_count);
end:
    if (packed != NULL)
        PyBuffer_Release(&header);
    release(&held);
    return answer;
}

static PyObject *put_writes(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    buffers_t held = {.count = 0};
    Py_ssize_t entry_count = 0, sum_count = 0;
    uint64_t n[4];
    PyObject *answer = NULL;
    (void)module;
    if (given != 6) {
        PyErr_SetString(PyExc_TypeError, "put_writes takes 6 arguments");
        return NULL;
    }
    char *const block = items(&held, arguments[0], 1, ENTRY_SIZE, &entry_count);
    const char *const sums = block ? items(&held, arguments[5], 0, 8, &sum_count) : NULL;
    if (sums == NULL || numbers(arguments + 1, 4, n) < 0)
        goto end;
    const uint64_t first = n[0] + ENTRIES_INDEX;
    if (n[0] > BLOCK_ENTRIES || entry_count != BLOCK_ENTRIES || first + (uint64_t)sum_count > BLOCK_ENTRIES) {
        PyErr_SetString(PyExc_ValueError, "the entries do not fit the block");
        goto end;
    }
    for (uint64_t i = 0; i < (uint64_t)sum_count; i++) {
        entry_t entry = {
            .lba = n[2] + i, .version = n[3], .volume_key = (uint32_t)n[1], .kind = WRITE, .sector_mask = 0xFF,
        };
        memcpy(&entry.checksum, sums + i * 8, 8);
        memcpy(block + (first + i) * ENTRY_SIZE, &entry, ENTRY_SIZE);
    }
    answer = Py_NewRef(Py_None);
end:
    release(&held);
    return answer;
}

static PyObject *enter_moves(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    buffers_t held = {.count = 0};
    Py_ssize_t packed_count = 0, count = 0, room[3] = {0};
    uint64_t n[3];
    PyObject *answer = NULL;
    (void)module;
    if (given != 7 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != 6
        || !PyTuple_Check(arguments[6]) || PyTuple_GET_SIZE(arguments[6]) != 3) {
        PyErr_SetString(PyExc_TypeError, "enter_moves takes 7 arguments, the first and last are tuples of 6 and 3");
        return NULL;
    }
    PyObject *const found = arguments[6];
    map_t map;
    const char *packed = NULL;
    if (open_map(&held, arguments[0], &map) == 0)
        packed = items(&held, arguments[2], 0, ENTRY_SIZE, &packed_count);
    const uint64_t *sources = packed ? items(&held, arguments[4], 0, 8, &count) : NULL;
    uint64_t *out[3];
    for (int i = 0; i < 3; i++) {
        out[i] = sources ? items(&held, PyTuple_GET_ITEM(found, i), 1, 8, &room[i]) : NULL;
        if (out[i] == NULL)
            sources = NULL;
    }
    if (sources == NULL || numbers(arguments + 1, 1, n) < 0 || numbers(arguments + 3, 1, n + 1) < 0
        || numbers(arguments + 5, 1, n + 2) < 0)
        goto end;
    const uint64_t zone_blocks = n[0], index = n[1], first_place = n[2], entries = (uint64_t)count;
    int fits = takes(&map, zone_blocks, first_place, entries) && entries <= (uint64_t)packed_count
        && index <= (uint64_t)packed_count - entries;
    for (int i = 0; i < 3; i++)
        fits = fits && count <= room[i];
    for (Py_ssize_t i = 0; i < count && fits; i++)
        fits = sources[i] != NIL && sources[i] < (uint64_t)map.place_count;
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or the entries do not fit them");
        goto end;
    }
    uint64_t moved_count = 0, held_count = 0;
    for (uint64_t i = 0; i < entries; i++) {
        entry_t entry;
        memcpy(&entry, packed + (index + i) * ENTRY_SIZE, ENTRY_SIZE);
        const uint64_t key = (uint64_t)entry.volume_key << LBA_BITS | entry.lba;
        const uint32_t source = (uint32_t)sources[i], place = (uint32_t)(first_place + i);
        if (map.keys[source] != key || map.versions[source] != entry.version)
            continue;
        if (map.nexts[source] == UNLINKED) {
            out[2][held_count++] = i;
            continue;
        }
        if (map.keys[place] != 0) {
            PyErr_Format(PyExc_SystemError, "the map is damaged at place %u", (unsigned)place);
            goto end;
        }
        uint32_t *const link = link_to(&map.heads[key % (uint64_t)map.head_count], map.nexts, map.place_count, source);
        if (link == NULL)
            goto end;
        *link = place;
        map.nexts[place] = map.nexts[source];
        map.nexts[source] = UNLINKED;
        map.keys[source] = 0;
        map.live[source / zone_blocks]--;
        map.keys[place] = key;
        map.versions[place] = entry.version;
        map.sums[place] = entry.checksum;
        map.live[place / zone_blocks]++;
        out[0][moved_count] = source;
        out[1][moved_count++] = place;
    }
    answer = Py_BuildValue("(KK)", (unsigned long long)moved_count, (unsigned long long)held_count);
end:
    release(&held);
    return answer;
}

static PyObject *clear_places(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    buffers_t held = {.count = 0};
    Py_ssize_t head_count = 0, next_count = 0, zone_count = 0, count = 0;
    uint64_t zone_blocks;
    map_t map;
    PyObject *answer = NULL;
    (void)module;
    if (given != 4 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != 6
        || !PyTuple_Check(arguments[1]) || PyTuple_GET_SIZE(arguments[1]) != 3) {
        PyErr_SetString(PyExc_TypeError, "clear_places takes 4 arguments, the first two are tuples of 6 and 3");
        return NULL;
    }
    uint32_t *heads = NULL;
    if (open_map(&held, arguments[0], &map) == 0)
        heads = items(&held, PyTuple_GET_ITEM(arguments[1], 0), 1, 4, &head_count);
    uint32_t *const nexts = heads ? items(&held, PyTuple_GET_ITEM(arguments[1], 1), 1, 4, &next_count) : NULL;
    uint16_t *const held_counts = nexts ? items(&held, PyTuple_GET_ITEM(arguments[1], 2), 1, 2, &zone_count) : NULL;
    const uint64_t *const places = held_counts ? items(&held, arguments[3], 0, 8, &count) : NULL;
    if (places == NULL || numbers(arguments + 2, 1, &zone_blocks) < 0)
        goto end;
    int fits = takes(&map, zone_blocks, 1, 0) && head_count > 0 && next_count == map.place_count
        && zone_count == map.live_count;
    for (Py_ssize_t i = 0; i < count && fits; i++)
        fits = places[i] < (uint64_t)map.place_count;
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or the places do not fit them");
        goto end;
    }
    uint64_t linked_count = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint32_t place = (uint32_t)places[i];
        const uint64_t key = map.keys[place];
        if (key == 0)
            continue;
        const int linked = map.nexts[place] != UNLINKED;
        uint32_t *const after = linked ? map.nexts : nexts;
        uint32_t *const head = linked ? &map.heads[key % (uint64_t)map.head_count] : &heads[key % (uint64_t)head_count];
        uint32_t *const link = link_to(head, after, map.place_count, place);
        if (link == NULL)
            goto end;
        *link = after[place];
        if (linked) {
            map.nexts[place] = UNLINKED;
            map.live[place / zone_blocks]--;
            linked_count++;
        } else {
            map.versions[place] = map.sums[place] = 0;
            held_counts[place / zone_blocks]--;
        }
        map.keys[place] = 0;
    }
    answer = PyLong_FromUnsignedLongLong(linked_count);
end:
    release(&held);
    return answer;
}

static PyObject *find_kept(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    buffers_t held = {.count = 0};
    Py_ssize_t state_count = 0, noted_count = 0, room = 0, kept = 0;
    uint64_t n[3];
    map_t map;
    PyObject *answer = NULL;
    (void)module;
    if (given != 7 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != 6) {
        PyErr_SetString(PyExc_TypeError, "find_kept takes 7 arguments, the first is a tuple of 6");
        return NULL;
    }
    const uint8_t *states = NULL;
    if (open_map(&held, arguments[0], &map) == 0)
        states = items(&held, arguments[1], 0, 1, &state_count);
    const uint64_t *const noted = states ? items(&held, arguments[2], 0, 8, &noted_count) : NULL;
    uint64_t *const found = noted ? items(&held, arguments[6], 1, 8, &room) : NULL;
    if (found == NULL || numbers(arguments + 3, 3, n) < 0)
        goto end;
    const uint64_t places = (uint64_t)map.place_count, first = n[0], count = n[1], worthy_from = n[2];
    if (!takes(&map, places + 1, 1, 0) || state_count != map.place_count || count > places || first > places - count) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or the places do not fit them");
        goto end;
    }
    for (uint64_t place = first; place < first + count && kept < room; place++) {
        const uint64_t key = map.keys[place];
        if (key == 0)
            continue;
        if (key >> LBA_BITS >= (uint64_t)noted_count) {
            PyErr_Format(PyExc_SystemError, "the map is damaged at place %u", (unsigned)place);
            goto end;
        }
        if (map.versions[place] > noted[key >> LBA_BITS]
            || (states[place] >= worthy_from && map.nexts[place] != UNLINKED))
            found[kept++] = place;
    }
    answer = PyLong_FromSsize_t(kept);
end:
    release(&held);
    return answer;
}

/* Append a run to a list, unless it is empty. */
static int add_run(PyObject *runs, int64_t place, uint64_t count)
{
    if (count == 0)
        return 0;
    PyObject *run = Py_BuildValue("(LK)", (long long)place, (unsigned long long)count);
    const int failed = run == NULL || PyList_Append(runs, run) < 0;
    Py_XDECREF(run);
    return failed ? -1 : 0;
}

static PyObject *find_runs(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    buffers_t held = {.count = 0};
    uint64_t n[2];
    map_t map;
    (void)module;
    if (given != 3 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != 6) {
        PyErr_SetString(PyExc_TypeError, "find_runs takes 3 arguments, the first is a tuple of 6");
        return NULL;
    }
    PyObject *runs = PyList_New(0);
    if (runs == NULL || open_map(&held, arguments[0], &map) < 0 || numbers(arguments + 1, 2, n) < 0)
        goto fail;
    if (map.head_count == 0 || map.key_count != map.place_count) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other");
        goto fail;
    }
    int64_t first = -1;
    uint64_t length = 0;
    for (uint64_t i = 0; i < n[1]; i++) {
        const uint64_t key = n[0] + i;
        uint32_t at = map.heads[key % (uint64_t)map.head_count];
        Py_ssize_t steps = 0;
        while (at != NIL && at < (uint64_t)map.place_count && map.keys[at] != key && steps++ < map.place_count)
            at = map.nexts[at];
        if (at >= (uint64_t)map.place_count || steps > map.place_count) {
            PyErr_Format(PyExc_SystemError, "the map is damaged at place %u", (unsigned)at);
            goto fail;
        }
        const int64_t place = at == NIL ? -1 : (int64_t)at;
        if (length && place == (first < 0 ? -1 : first + (int64_t)length)) {
            length++;
            continue;
        }
        if (add_run(runs, first, length) < 0)
            goto fail;
        first = place;
        length = 1;
    }
    if (add_run(runs, first, length) < 0)
        goto fail;
    release(&held);
    return runs;
fail:
    Py_XDECREF(runs);
    release(&held);
    return NULL;
}

/* Where a key is looked for first among KEY_SLOTS; at most ENTRIES_MAX of them are taken, so a search ends. */
static inline unsigned slot_of(uint64_t key) { return (unsigned)(key * 0x9E3779B97F4A7C15u >> 56); }

static PyObject *mark_written(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    buffers_t held = {.count = 0};
    Py_ssize_t entry_count = 0, key_count = 0, found_count = 0;
    uint64_t count;
    uint8_t slots[KEY_SLOTS] = {0}; /* number of a key plus one */
    PyObject *answer = NULL;
    (void)module;
    if (given != 4) {
        PyErr_SetString(PyExc_TypeError, "mark_written takes 4 arguments");
        return NULL;
    }
    const char *const block = items(&held, arguments[0], 0, ENTRY_SIZE, &entry_count);
    const uint64_t *const keys = block ? items(&held, arguments[2], 0, 8, &key_count) : NULL;
    uint8_t *const found = keys ? items(&held, arguments[3], 1, 1, &found_count) : NULL;
    if (found == NULL || numbers(arguments + 1, 1, &count) < 0)
        goto end;
    if (entry_count != BLOCK_ENTRIES || count > ENTRIES_MAX || key_count != found_count || key_count > ENTRIES_MAX) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not fit each other, or are too long");
        goto end;
    }
    for (Py_ssize_t i = 0; i < key_count; i++) {
        unsigned slot = slot_of(keys[i]);
        while (slots[slot])
            slot = (slot + 1) % KEY_SLOTS;
        slots[slot] = (uint8_t)(i + 1);
    }
    for (uint64_t i = 0; i < count; i++) {
        entry_t entry;
        memcpy(&entry, block + (ENTRIES_INDEX + i) * ENTRY_SIZE, ENTRY_SIZE);
        if (entry.kind != WRITE)
            continue;
        const uint64_t key = (uint64_t)entry.volume_key << LBA_BITS | entry.lba;
        for (unsigned slot = slot_of(key); slots[slot]; slot = (slot + 1) % KEY_SLOTS)
            if (keys[slots[slot] - 1] == key)
                found[slots[slot] - 1] = 1;
    }
    answer = Py_NewRef(Py_None);
end:
    release(&held);
    return answer;
}

static PyMethodDef methods[] = {
    {"mark_written", (PyCFunction)(void (*)(void))mark_written, METH_FASTCALL, NULL},
    {"clear_places", (PyCFunction)(void (*)(void))clear_places, METH_FASTCALL, NULL},
    {"find_kept", (PyCFunction)(void (*)(void))find_kept, METH_FASTCALL, NULL},
    {"find_runs", (PyCFunction)(void (*)(void))find_runs, METH_FASTCALL, NULL},
    {"enter_moves", (PyCFunction)(void (*)(void))enter_moves, METH_FASTCALL, NULL},
    {"put_writes", (PyCFunction)(void (*)(void))put_writes, METH_FASTCALL, NULL},
    {"enter_writes", (PyCFunction)(void (*)(void))enter_writes, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "forebay_cache._native", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "NIL", NIL) < 0)
        Py_CLEAR(module);
    return module;
}
