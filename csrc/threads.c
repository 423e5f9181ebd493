/* Threads. This library links no OpenMP: torch brings its own, and two runtimes in one process
 * fight. On Linux the loader hands over the entry of the very runtime that torch has loaded, so
 * that both share one team of threads: those of a second pool would compete with torch's, which go
 * on spinning for a while after each of its operations. Elsewhere, and after fork (which no OpenMP
 * team survives), there is a small pool of our own.
 *
 * One call at a time has the pool; a call that finds it taken (another Python thread) runs on its
 * own thread alone. The caller works too, so a call never waits for a worker to wake. A fork waits
 * for the call that has the pool; the child has no workers and starts its own when it needs them.
 */
#include "engine.h"

#if defined(_WIN32)

int64_t bytes_worth_a_thread(void) { return INT64_MAX; }

void torchopt_use_team(void *function) { (void)function; }

void run_in_parallel(task_function task, void *context, int64_t count, int64_t wanted,
                     int64_t allowed) {
  (void)wanted, (void)allowed;
  for (int64_t k = 0; k < count; ++k) task(context, k);
}

#else

#include <pthread.h>
#include <signal.h>

#define MAX_WORKERS 255
#define MAX_TEAM 4096u
/* The stand-ins of a call (engine.c) and the registers of a program take 400 KB of it, and what a
 * sanitizer keeps for a thread 800. */
#define STACK_SIZE (2 << 20)

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* held by the call that has the pool */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  /* guards all below */
static pthread_cond_t work_came = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_done = PTHREAD_COND_INITIALIZER;
static int64_t workers; /* how many there are */
static int64_t seats;   /* how many of them may still join the call */
static task_function current_task;
static void *current_context;
static int64_t next_share, shares, unfinished;

/* Take shares until none is left; called and left with the lock held. */
static void take_shares(void) {
  while (next_share < shares) {
    int64_t share = next_share++;
    task_function task = current_task;
    void *context = current_context;
    pthread_mutex_unlock(&lock);
    task(context, share);
    pthread_mutex_lock(&lock);
    if (--unfinished == 0) pthread_cond_signal(&work_done);
  }
}

static void *work(void *unused) {
  (void)unused;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (seats == 0) pthread_cond_wait(&work_came, &lock);
    --seats;
    take_shares();
  }
  return NULL;
}

/* GOMP_parallel of the OpenMP runtime that torch uses, or NULL. */
typedef void (*team_function)(void (*task)(void *), void *context, unsigned threads,
                              unsigned flags);
static ATOMIC team_function team;

struct team_work {
  task_function task;
  void *context;
  int64_t count;
  ATOMIC int64_t next;
};

static void take_team_shares(void *context) {
  struct team_work *work = context;
  for (int64_t share; (share = work->next++) < work->count;) work->task(work->context, share);
}

static void before_fork(void) {
  pthread_mutex_lock(&owner);
  pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void) {
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&owner);
}

static void after_fork_in_child(void) {
  workers = 0; /* threads do not survive fork, and a team of OpenMP would wait for them */
  team = NULL;
  seats = next_share = shares = unfinished = 0;
  pthread_cond_init(&work_came, NULL);
  pthread_cond_init(&work_done, NULL);
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&owner);
}

static void watch_fork(void) {
  pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* Measured on two cores. A team that has just worked for torch still spins and takes over at once:
 * it gains from less than 1 million bytes in all; one that sleeps breaks even at 5 to 7 million. To
 * wake a thread of the pool delays the caller by 10 us, and it arrives 50 us later: two threads
 * break even between 5 and 12 million bytes in all, and gain a half at 15 to 30 million. */
int64_t bytes_worth_a_thread(void) { return team != NULL ? 1500000 : 6000000; }

static pthread_once_t watching = PTHREAD_ONCE_INIT;

void torchopt_use_team(void *function) {
  pthread_once(&watching, watch_fork);
  team = (team_function)function;
}

/* Called with the lock held. Signals stay with the threads of Python. */
static void start_workers(int64_t wanted) {
  pthread_attr_t attributes;
  sigset_t all, before;
  if (workers >= wanted || pthread_attr_init(&attributes) != 0) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, STACK_SIZE);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (workers < wanted && workers < MAX_WORKERS) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, work, NULL) != 0) break; /* fewer: same result */
    ++workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
}

void run_in_parallel(task_function task, void *context, int64_t count, int64_t wanted,
                     int64_t allowed) {
  team_function use = team;
  if (use != NULL) { /* as large as torch makes it: OpenMP ends the threads a smaller one spares */
    struct team_work work = {task, context, count, 0};
    use(take_team_shares, &work, allowed < MAX_TEAM ? (unsigned)allowed : MAX_TEAM, 0);
    return;
  }
  pthread_once(&watching, watch_fork); /* before any lock is taken: a child would find it taken */
  if (pthread_mutex_trylock(&owner) != 0) {
    for (int64_t k = 0; k < count; ++k) task(context, k);
    return;
  }
  pthread_mutex_lock(&lock);
  start_workers(wanted - 1);
  current_task = task;
  current_context = context;
  next_share = 0;
  shares = unfinished = count;
  seats = wanted - 1 < workers ? wanted - 1 : workers;
  /* not all at once: those without a seat would wake for nothing */
  for (int64_t k = seats; k > 0; --k) pthread_cond_signal(&work_came);
  take_shares();
  while (unfinished > 0) pthread_cond_wait(&work_done, &lock);
  seats = 0;
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&owner);
}

#endif
