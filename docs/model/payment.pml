/* Two payments of one account, two refreshes, and one fault, in every order of their steps.
 *
 * An `atomic` block is one transaction or one call; any other step may run between two blocks.
 * A message that is sent after a transaction is sent inside its block: a later send equals a later fetch.
 * Where a process may be killed, the kill is one of the block's results, and its fetched message returns to the broker.
 * Time is free: a deadline, a window or a grace period may end at any moment.
 * A fault is a killed worker, lost Redis data, or a rate-limited call; `-DFAULTS=2` permits two faults.
 *
 * The correlation store is not modelled: it may give a joining payment any result.
 * The claims are therefore true for every content of Redis.
 * The names are those of worker/flow/ and worker/rules/states.py.
 *
 * `-DBREAK_...` removes one rule, and the search must find the claim that depends on it: see ../explanation/model.md.
 */

#ifndef FAULTS
#define FAULTS 1
#endif
#define MAX_UNCERTAIN_CALLS 2    /* of one refresh whose result may be unknown */

#define HAS(mask, i)      (((mask) >> (i)) & 1)
#define WAITS(i)          (pay[i] == WAITING)
#define ANY_WAITS         (WAITS(0) || WAITS(1))
/* The payments that exist and need a balance of their own; for other payments it makes no difference. */
#define PRESENT           ((own[0] && pay[0] != NONE) | ((own[1] && pay[1] != NONE) << 1))
#define ALL_RESOLVED      (pay[0] == RESOLVED && pay[1] == RESOLVED)
#define IN_FLIGHT(r)      (refresh[r] == CALLING || refresh[r] == ACCEPTED || refresh[r] == UNCERTAIN)
#define IS_ACTIVE(r)      (refresh[r] == REQUESTED || IN_FLIGHT(r))
#define SHARES(r, i)      (!own[i] || call_count[r] == 0 || HAS(before_call[r], i))
#define SERVED(i)         ((IS_ACTIVE(0) && SHARES(0, i)) || (IS_ACTIVE(1) && SHARES(1, i)))
#define SERVES_ALL(r)     ((!WAITS(0) || SHARES(r, 0)) && (!WAITS(1) || SHARES(r, 1)))
#define COUNT(r, s)       ((entry[2*(r)] == s) + (entry[2*(r) + 1] == s))

mtype = { NONE, WAITING, RESOLVED };  /* released or failed: the model needs no difference */
mtype = { UNWRITTEN, REQUESTED, CALLING, ACCEPTED, UNCERTAIN, ANSWERED, UNANSWERED, REJECTED, ABANDONED };
mtype = { NO_ENTRY, PENDING, POSTED };
mtype = { NO_EVENT, EXPECTED, SENT, SENT_AGAIN, ACKNOWLEDGED, LOST };
#define IS_COMMITTED(b)   (event[b] == SENT_AGAIN || event[b] == ACKNOWLEDGED)

/* SQL. Each payment may lead one refresh, and each refresh may cause one balance: all three have the same number. */
mtype pay[2] = NONE;
bool own[2];                     /* needs a balance no older than itself; else any balance resolves it */
mtype refresh[2] = UNWRITTEN;
byte call_count[2];              /* of the refresh, the calls that may be charged */
byte before_call[2];             /* the payments that existed when its first call was made */
byte latest;                     /* the refresh that was called last */
mtype entry[4] = NO_ENTRY;       /* fee entries: two calls of each refresh; a void entry frees its place */
bool applied[2];                 /* a committed balance */
byte attributed[2];              /* 1 + the refresh that the balance was attributed to */

/* The broker. Lost messages do not return; the payments service sends its jobs again. */
bool job[2] = true;
bool call_message[2], apply_message[2];

/* The environment */
bool in_transit[2];              /* a live worker makes this refresh's call */
mtype event[2] = NO_EVENT;       /* webhook: expected, sent, committed and sent again, committed and acknowledged */
byte before_balance[2];          /* the payments that existed when the balance was created */
byte candidates[2];              /* the refreshes whose call had been made by then */
byte accepted;                   /* calls that the provider will charge */

byte faults = FAULTS;
bool redis_lost_data;            /* Redis lost its data: a fetched message does not return */

inline resolve(payment) {
  assert(WAITS(payment));                                       /* one outcome */
  pay[payment] = RESOLVED;
  if
  :: ALL_RESOLVED ->
       before_call[0] = 0; before_call[1] = 0; before_balance[0] = 0; before_balance[1] = 0;
       attributed[0] = 0; attributed[1] = 0
  :: else                                                       /* no step reads these again */
  fi
}

inline fail_all() {
  if :: WAITS(0) -> resolve(0) :: else fi;
  if :: WAITS(1) -> resolve(1) :: else fi
}

inline call_queued(queued) {                                    /* it was queued behind the refresh in flight */
  if :: refresh[queued] == REQUESTED -> call_message[queued] = true :: else fi
}

/* --- initiate --- */

proctype initiate(bit i) {
end:
  do
  :: atomic { job[i] ->
       if :: pay[i] == NONE -> pay[i] = WAITING :: else fi;
       if
       :: WAITS(i) -> call_message[i] = true                    /* it leads */
       :: skip                                                  /* it joins the other refresh: Redis may be wrong */
       fi;
       if
       :: faults > 0 -> faults--                                /* the job returns */
       :: job[i] = false
       fi }
  od
}

/* --- call --- */

#define KILLED  faults > 0 -> faults--; in_transit[r] = false; \
                if :: redis_lost_data :: !redis_lost_data -> call_message[r] = true fi; k = 0; status = NONE; goto idle

proctype caller(bit r) {
  bit k;
  mtype status = NONE;
end:
idle:
  atomic {                                                      /* the claim and the fee entry: one transaction */
    call_message[r] -> call_message[r] = false;
    if
    :: !(refresh[r] == UNWRITTEN || refresh[r] == REQUESTED) -> goto idle
    :: (refresh[r] == UNWRITTEN || refresh[r] == REQUESTED) && !ANY_WAITS ->
         if :: refresh[r] == REQUESTED -> refresh[r] = ABANDONED :: else fi;
         goto idle
#ifndef BREAK_ONE_IN_FLIGHT
    :: (refresh[r] == UNWRITTEN || refresh[r] == REQUESTED) && ANY_WAITS && IN_FLIGHT(1-r) ->
         if
         :: !SERVES_ALL(1-r) -> refresh[r] = REQUESTED          /* queued behind the refresh in flight */
         :: SERVES_ALL(1-r) && refresh[r] == REQUESTED -> refresh[r] = ABANDONED
         :: else
         fi;
         goto idle
#endif
    :: else ->
         if :: call_count[r] == 0 -> before_call[r] = PRESENT; latest = r :: else fi;
         k = call_count[r]; call_count[r]++;
         assert(call_count[r] <= MAX_UNCERTAIN_CALLS);
         refresh[r] = CALLING; in_transit[r] = true;
#ifndef BREAK_ENTRY_BEFORE_CALL
         entry[2*r + k] = PENDING
#endif
    fi };
  atomic {                                                      /* the call, and the provider's decision */
    if
    :: KILLED
    :: true ->
         assert(entry[2*r + k] != NO_ENTRY);                    /* written before the call */
         assert(!IN_FLIGHT(1-r) || k > 0);                      /* the only call in flight, except after a lost result */
         if
         :: accepted++; status = ACCEPTED; if :: event[r] == NO_EVENT -> event[r] = EXPECTED :: skip fi
         :: accepted++; status = UNCERTAIN; if :: event[r] == NO_EVENT -> event[r] = EXPECTED :: skip fi
         :: status = UNCERTAIN                                  /* not accepted, but the result is unknown */
         :: status = REJECTED
         :: faults > 0 -> faults--; status = REQUESTED          /* not accepted, and deferred */
         fi
    fi };
  atomic {                                                      /* record the result; changes by a balance remain */
    if
    :: KILLED
    :: true ->
         if
         :: status == ACCEPTED -> entry[2*r + k] = POSTED
#ifdef BREAK_UNKNOWN_STAYS_PENDING
         :: status == UNCERTAIN && entry[2*r + k] == PENDING -> entry[2*r + k] = NO_ENTRY
#endif
         :: (status == REJECTED || status == REQUESTED) && entry[2*r + k] == PENDING -> entry[2*r + k] = NO_ENTRY
         :: else
         fi;
         if
         :: refresh[r] == CALLING ->
              refresh[r] = status;
              if
              :: status == REJECTED -> call_count[r]--; fail_all(); call_queued(1-r)
              :: status == REQUESTED -> call_count[r]--
              :: else
              fi
         :: else
         fi;
         in_transit[r] = false; k = 0; status = NONE; goto idle
    fi }
}

/* --- ingest and apply --- */

proctype bank(bit b) {
end:
  do
  :: atomic { event[b] == EXPECTED ->
       event[b] = SENT; before_balance[b] = PRESENT * !ALL_RESOLVED;
       candidates[b] = (call_count[0] > 0) | ((call_count[1] > 0) << 1) }
  od
}

proctype web(bit b) {
end:
  do
  :: atomic { event[b] == SENT || event[b] == SENT_AGAIN ->     /* commit, then enqueue and respond */
       if
#ifndef BREAK_COMMIT_BEFORE_2XX
       :: faults > 0 -> faults--; event[b] = SENT_AGAIN; if :: apply_message[b] = true :: skip fi
       :: event[b] = ACKNOWLEDGED; apply_message[b] = true
#else
       :: faults > 0 -> faults--; event[b] = LOST               /* responds, and is killed before the commit */
       :: event[b] = ACKNOWLEDGED; apply_message[b] = true
#endif
       fi }
  od
}

#define MAY_EXPLAIN(r)    (HAS(candidates[b], r) && call_count[r] > 0 && refresh[r] != ANSWERED)
#define CALLS_OF(r)       (COUNT(r, PENDING) + COUNT(r, POSTED))
#define IS_OWN(i)         (attributed[b] > 0 && HAS(before_call[attributed[b] - 1], i))
#define IS_FRESH(i)       (!own[i] || (HAS(before_balance[b], i) && IS_OWN(i)))

inline release_if_fresh(payment) {
  if
#ifdef BREAK_FRESHNESS
  :: WAITS(payment) ->
#else
  :: WAITS(payment) && IS_FRESH(payment) ->
#endif
       assert(!own[payment] || HAS(before_balance[b], payment));  /* a fresh balance */
       resolve(payment)
  :: else
  fi
}

inline attribute() {                                            /* to the last call that can explain it */
  if
  :: MAY_EXPLAIN(latest) -> attributed[b] = 1 + latest
  :: !MAY_EXPLAIN(latest) && MAY_EXPLAIN(1-latest) -> attributed[b] = 2 - latest
  :: else
  fi;
  if
  :: attributed[b] > 0 ->
       f = attributed[b] - 1;
       if                                                       /* a call is posted if no other call can be the cause */
       :: CALLS_OF(f) + MAY_EXPLAIN(1-f) * CALLS_OF(1-f) == 1 && entry[2*f] == PENDING -> entry[2*f] = POSTED
       :: CALLS_OF(f) + MAY_EXPLAIN(1-f) * CALLS_OF(1-f) == 1 && entry[2*f + 1] == PENDING -> entry[2*f + 1] = POSTED
       :: else
       fi;
       refresh[f] = ANSWERED; f = 0
  :: else
  fi
}

proctype apply(bit b) {
  bit f;
end:
  do
  :: atomic { apply_message[b] ->
       apply_message[b] = false;
       if :: !applied[b] -> attribute() :: else fi;
       release_if_fresh(0); release_if_fresh(1);
       applied[b] = true; candidates[b] = 0; attributed[b] = attributed[b] * !ALL_RESOLVED;
       if
       :: faults > 0 -> faults--; if :: redis_lost_data :: !redis_lost_data -> apply_message[b] = true fi
       :: call_queued(0); call_queued(1)
       fi }
  od
}

/* --- maintenance --- */

proctype expire(bit i) {
end:
  do
#ifndef BREAK_DEADLINE
#ifdef BREAK_ONE_WRITE_DECIDES
  :: WAITS(i) -> resolve(i)                                     /* read as waiting, then written: two steps */
#else
  :: atomic { WAITS(i) -> resolve(i) }
#endif
#endif
  :: atomic { WAITS(i) && !SERVED(i) && refresh[i] == UNWRITTEN && !call_message[i] -> call_message[i] = true }
  od
}

#define IS_QUEUED(r)      (refresh[r] == REQUESTED && !call_message[r] && !IN_FLIGHT(1-r))
#define IS_LOST(r)        (refresh[r] == CALLING && !in_transit[r])
#ifdef BREAK_ONE_REPEAT
#define MAY_REPEAT(r)     ANY_WAITS
#else
#define MAY_REPEAT(r)     (call_count[r] < MAX_UNCERTAIN_CALLS && ANY_WAITS)
#endif

proctype sweep(bit r) {
end:
  do
  :: atomic { IS_COMMITTED(r) && !applied[r] && !apply_message[r] -> apply_message[r] = true }
#ifndef BREAK_SWEEP
  :: atomic { IS_QUEUED(r) && ANY_WAITS -> call_message[r] = true }
  :: atomic { refresh[r] == REQUESTED && !ANY_WAITS -> refresh[r] = ABANDONED }
  :: atomic { IS_LOST(r) -> refresh[r] = UNCERTAIN }
  :: atomic { refresh[r] == UNCERTAIN && MAY_REPEAT(r) -> refresh[r] = REQUESTED; call_message[r] = true }
  :: atomic { refresh[r] == ACCEPTED || (refresh[r] == UNCERTAIN && !MAY_REPEAT(r)) ->
       refresh[r] = UNANSWERED; call_queued(1-r) }
#endif
  od
}

/* --- Redis loses its data, once --- */

proctype lose_redis_data() {
end:
  atomic { faults > 0 ->
    faults--; redis_lost_data = true;
    call_message[0] = false; call_message[1] = false; apply_message[0] = false; apply_message[1] = false }
}

/* --- deliver, after all other steps, because none depends on it; then check the claims --- */

inline deliver(i) {
  due = true; delivered = false; may_crash = true;              /* due since the resolution, in the same transaction */
  do
  :: due ->
#ifdef BREAK_DELIVER_THEN_MARK
       due = false;
       if :: may_crash -> may_crash = false :: delivered = true fi
#else
       delivered = true;
       if :: may_crash -> may_crash = false :: due = false fi   /* killed between the two: it is delivered again */
#endif
  :: !due -> break
  od;
  assert(delivered)
}

proctype final_checks() {
  bool due, delivered, may_crash;
end:
  atomic { timeout ->
    assert(pay[0] == RESOLVED && pay[1] == RESOLVED);           /* every payment is resolved */
    deliver(0); deliver(1);
    assert(!IS_ACTIVE(0) && !IS_ACTIVE(1));                     /* an active refresh would block its account */
    assert(event[0] != LOST && event[1] != LOST);               /* a 2xx only for committed events */
    assert(COUNT(0, POSTED) + COUNT(1, POSTED) <= accepted);
    assert(accepted <= CALLS_OF(0) + CALLS_OF(1)) }
}

init {
  atomic {
#ifndef ONLY_MIXED
    if :: skip :: own[0] = true fi;
    if :: !own[0] :: own[1] = true fi;
#else
    own[1] = true;
#endif
    run initiate(0); run initiate(1); run caller(0); run caller(1); run bank(0); run bank(1); run web(0); run web(1);
    run apply(0); run apply(1); run expire(0); run expire(1); run sweep(0); run sweep(1);
    run lose_redis_data(); run final_checks() }
}
