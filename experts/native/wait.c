/* Waiting as transport/waiting.py says it: looking, yielding in between, then asleep. Called without Python's lock. */

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <time.h>

#define MAX_EVENTS 64

/* An end whose news lie in memory: what the other end has published, what was taken of it, whether this one sleeps. */
typedef struct {
  const uint8_t *published, *taken;
  uint8_t *asleep;
} End;

/* Who has something: places in the array of ends, and (descriptor, events) of sockets. */
typedef struct {
  int64_t num_news, num_events, waited_ns;
  int64_t events[MAX_EVENTS][2];
  int64_t news[];
} Found;

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void look_at_memory(const End *ends, int64_t num_ends, Found *found) {
  found->num_news = 0;
  for (int64_t i = 0; i < num_ends; i++)
    if (__atomic_load_n(ends[i].published, __ATOMIC_ACQUIRE) != *ends[i].taken) found->news[found->num_news++] = i;
}

/* Returns 0, or the error that the system gives. */
static int look_at_sockets(int epoll, int64_t timeout_ns, Found *found) {
  struct epoll_event events[MAX_EVENTS];
  int64_t timeout_ms = (timeout_ns + 999999) / 1000000;
  int count = epoll_wait(epoll, events, MAX_EVENTS, (int)(timeout_ms < INT32_MAX ? timeout_ms : INT32_MAX));
  found->num_events = count < 0 ? 0 : count;
  for (int i = 0; i < count; i++) {
    found->events[i][0] = events[i].data.fd;
    found->events[i][1] = events[i].events;
  }
  return count < 0 && errno != EINTR ? errno : 0;
}

/* One look at everything: the sockets for up to timeout_ns if there is nothing in memory. */
static int look(const End *ends, int64_t num_ends, int epoll, int64_t timeout_ns, Found *found) {
  look_at_memory(ends, num_ends, found);
  return look_at_sockets(epoll, found->num_news ? 0 : timeout_ns, found);
}

static int nothing(const Found *found) { return !found->num_news && !found->num_events; }

/* Returns 0 or an errno. Ends early, with nothing found, for a signal: Python may want to hear of it. */
int wait_for_any(const End *ends, int64_t num_ends, int epoll, int64_t spin_ns, int64_t timeout_ns, Found *found) {
  found->waited_ns = 0;
  int error = look(ends, num_ends, epoll, 0, found);
  if (error || !nothing(found) || timeout_ns <= 0) return error;
  int64_t started_at = now_ns(), now = started_at;
  int64_t spin_until = started_at + (spin_ns < timeout_ns ? spin_ns : timeout_ns);
  while (!error && nothing(found) && now < spin_until) {
    sched_yield();
    error = look(ends, num_ends, epoll, 0, found);
    now = now_ns();
  }
  if (!error && nothing(found)) {
    for (int64_t i = 0; i < num_ends; i++) __atomic_store_n(ends[i].asleep, 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    int64_t left_ns = started_at + timeout_ns - now;
    error = look(ends, num_ends, epoll, left_ns > 0 ? left_ns : 0, found);
    for (int64_t i = 0; i < num_ends; i++) __atomic_store_n(ends[i].asleep, 0, __ATOMIC_RELAXED);
    /* What the ring was for. */
    look_at_memory(ends, num_ends, found);
    now = now_ns();
  }
  found->waited_ns = now - started_at;
  return error;
}
