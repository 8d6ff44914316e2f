/* The sequential streams of one volume; `forebay_cache.engine.streams` is its twin and says what all of it means.

   Positions are any numbers that grow by one from block to block. Streams lie in any order and are listed in that of
   their turns; a table of zeros is an empty one. */

#ifndef FOREBAY_STREAMS_H
#define FOREBAY_STREAMS_H

#include <stdint.h>

#define STREAMS_MAX 16
#define STREAM_STEP_MIN 16
#define STREAM_SLACK_BLOCKS 256
#define STREAM_TURNS 64

typedef struct {
    int64_t end, missed, asked, window, turn;
} stream_t;

typedef struct {
    int64_t low[STREAMS_MAX]; /* a read that begins there, or up to `reach` behind it, may go on with the stream */
    uint64_t reach[STREAMS_MAX];
    stream_t all[STREAMS_MAX];
    uint8_t next[STREAMS_MAX], prev[STREAMS_MAX]; /* in a ring */
    uint8_t oldest;
    int64_t turn;
    int count;
} streams_t;

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The stream that a read goes on with, or -1. */
static int find_stream(const streams_t *streams, int64_t start, int64_t end)
{
    unsigned near = 0; /* all are compared without a branch: most reads are near none */
    for (int at = 0; at < streams->count; at++)
        near |= (unsigned)((uint64_t)(start - streams->low[at]) <= streams->reach[at]) << at;
    int found = -1;
    for (; near; near &= near - 1) {
        const int at = __builtin_ctz(near);
        const stream_t *stream = &streams->all[at];
        if ((stream->window || stream->end < end) && (found < 0 || stream->turn > streams->all[found].turn))
            found = at;
    }
    return found;
}

static inline int64_t missed_of(const streams_t *streams, int found)
{
    return found < 0 ? 0 : streams->all[found].missed;
}

static void set_reach(streams_t *streams, int at)
{
    const stream_t *stream = &streams->all[at];
    const int64_t slack = stream->window ? STREAM_SLACK_BLOCKS : 0;
    streams->low[at] = stream->end - (slack ? slack : 1);
    streams->reach[at] = (uint64_t)((slack ? larger(stream->end, stream->asked) + slack : stream->end) - streams->low[at]);
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

/* Put a stream that is in no list before the oldest one, which is behind all others. */
static void link_newest(streams_t *streams, int at)
{
    const int oldest = streams->oldest, newest = streams->prev[oldest];
    streams->next[at] = (uint8_t)oldest;
    streams->prev[at] = (uint8_t)newest;
    streams->next[newest] = streams->prev[oldest] = (uint8_t)at;
}

static void renew_stream(streams_t *streams, int at)
{
    streams->all[at].turn = streams->turn;
    if (at == streams->oldest) {
        streams->oldest = streams->next[at];
        return;
    }
    streams->next[streams->prev[at]] = streams->next[at];
    streams->prev[streams->next[at]] = streams->prev[at];
    link_newest(streams, at);
}

static void begin_stream(streams_t *streams, int64_t end, int64_t missed)
{
    int at = streams->oldest;
    if (streams->count < STREAMS_MAX) {
        at = streams->count++;
        link_newest(streams, at);
    } else {
        renew_stream(streams, at);
    }
    streams->all[at] = (stream_t){end, missed, end, 0, streams->turn};
    set_reach(streams, at);
}

/* Blocks were read of which the store had to bring some, as a part of the stream that was found. Returns how many blocks
   to read ahead, `*ahead` is the first. */
static int64_t read_stream(
    streams_t *streams, int found, int64_t start, int64_t end, int64_t missed, int64_t ahead_max, int64_t *ahead)
{
    streams->turn++;
    if (found < 0) {
        begin_stream(streams, end, missed);
        return 0;
    }
    stream_t *stream = &streams->all[found];
    renew_stream(streams, found);
    stream->missed += missed;
    stream->end = larger(stream->end, end);
    stream->asked = larger(stream->asked, stream->end);
    *ahead = stream->asked;
    const int64_t count = ahead_max ? extend_stream(streams, stream, end - start, ahead_max) : 0;
    set_reach(streams, found);
    return count;
}

#endif
