/* The sequential streams of one volume; `forebay_cache.engine.streams` is its twin and says what all of it means.

   Positions are any numbers that grow by one from block to block. */

#ifndef FOREBAY_STREAMS_H
#define FOREBAY_STREAMS_H

#include <stdint.h>
#include <string.h>

#define STREAMS_MAX 16
#define STREAM_STEP_MIN 16
#define STREAM_SLACK_BLOCKS 256
#define STREAM_TURNS 64

typedef struct {
    int64_t end, missed, asked, window, turn;
} stream_t;

typedef struct {
    stream_t all[STREAMS_MAX]; /* the one that was read last at the end */
    int count;
    int64_t turn;
} streams_t;

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int goes_on(const stream_t *stream, int64_t start, int64_t end)
{
    if (!stream->window)
        return stream->end - 1 <= start && start <= stream->end && stream->end < end;
    return stream->end - STREAM_SLACK_BLOCKS <= start
        && start <= larger(stream->end, stream->asked) + STREAM_SLACK_BLOCKS;
}

/* The index of the stream that a read goes on with, or -1. */
static int find_stream(const streams_t *streams, int64_t start, int64_t end)
{
    int at = streams->count - 1;
    while (at >= 0 && !goes_on(&streams->all[at], start, end))
        at--;
    return at;
}

static int64_t missed_before(const streams_t *streams, int64_t start, int64_t end)
{
    const int at = find_stream(streams, start, end);
    return at < 0 ? 0 : streams->all[at].missed;
}

static void drop_stream(streams_t *streams, int at)
{
    streams->count--;
    memmove(&streams->all[at], &streams->all[at + 1], sizeof(stream_t) * (size_t)(streams->count - at));
}

/* How much a stream wants read ahead from its old `asked` on. */
static int64_t extend_stream(const streams_t *streams, stream_t *stream, int64_t read_count, int64_t ahead_max)
{
    if (stream->window > 0 && 2 * (stream->asked - stream->end) > stream->window)
        return 0;
    int64_t busy = 0;
    for (int at = 0; at < streams->count; at++)
        busy += streams->all[at].window && streams->all[at].turn > streams->turn - STREAM_TURNS;
    const int64_t wanted = stream->window ? 2 * stream->window : larger(STREAM_STEP_MIN, read_count);
    stream->window = smaller(wanted, larger(ahead_max / larger(busy, 1), STREAM_STEP_MIN));
    const int64_t start = stream->asked;
    stream->asked = larger(start, stream->end + stream->window);
    return stream->asked - start;
}

/* Blocks were read of which the store had to bring some. Returns how many blocks to read ahead, `*ahead` is the first. */
static int64_t read_stream(
    streams_t *streams, int64_t start, int64_t end, int64_t missed, int64_t ahead_max, int64_t *ahead)
{
    streams->turn++;
    const int found = find_stream(streams, start, end);
    stream_t stream = {end, missed, end, 0, streams->turn};
    if (found >= 0) {
        stream = streams->all[found];
        stream.turn = streams->turn;
        stream.missed += missed;
        stream.end = larger(stream.end, end);
        stream.asked = larger(stream.asked, stream.end);
        drop_stream(streams, found);
    } else if (streams->count == STREAMS_MAX) {
        drop_stream(streams, 0);
    }
    stream_t *last = &streams->all[streams->count++];
    *last = stream;
    *ahead = stream.asked;
    return found >= 0 && ahead_max ? extend_stream(streams, last, end - start, ahead_max) : 0;
}

#endif
