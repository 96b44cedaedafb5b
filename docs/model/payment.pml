/* Two payments of one account, two refreshes, and one fault: every order of their steps.
 *
 * An `atomic` is what happens in one transaction, or one call; between two of them anything else may happen. What is
 * sent after a transaction is sent in it: sent later would be no other than taken later. Where whoever does it may be
 * killed, that is one of its ends, and what it had taken from the broker comes back. Time is free: a deadline, a window,
 * a grace time may be over at any moment. A fault is a worker killed, Redis emptied, or a call throttled; `-DFAULTS=2`
 * lets two of them happen.
 *
 * What Redis knows of an account is not here: to a payment that joins it may say anything. So what follows holds
 * whatever it says. Names are those of worker/flow.py and worker/payment.py.
 *
 * `-DBREAK_...` takes one rule away, and the search must find what the rule is for: README.md.
 */

#ifndef FAULTS
#define FAULTS 1
#endif
#define MAX_CALLS 2              /* of one refresh whose fate may be unknown */

#define HAS(mask, i)   (((mask) >> (i)) & 1)
#define WAITS(i)       (pay[i] == WAITING)
#define ANY_WAITS      (WAITS(0) || WAITS(1))
#define THERE          ((own[0] && pay[0] != NONE) | ((own[1] && pay[1] != NONE) << 1))  /* to others it is all one */
#define ALL_SETTLED    (pay[0] == SETTLED && pay[1] == SETTLED)
#define FLIES(r)       (refresh[r] == CALLING || refresh[r] == ACCEPTED || refresh[r] == UNCERTAIN)
#define IS_OPEN(r)     (refresh[r] == REQUESTED || FLIES(r))
#define SHARES(r, i)   (!own[i] || calls[r] == 0 || HAS(called[r], i))
#define SERVED(i)      ((IS_OPEN(0) && SHARES(0, i)) || (IS_OPEN(1) && SHARES(1, i)))
#define SUITS_ALL(r)   ((!WAITS(0) || SHARES(r, 0)) && (!WAITS(1) || SHARES(r, 1)))
#define COUNT(r, s)    ((entry[2*(r)] == s) + (entry[2*(r) + 1] == s))

mtype = { NONE, WAITING, SETTLED };  /* released or failed: that is told, and decides nothing more */
mtype = { UNWRITTEN, REQUESTED, CALLING, ACCEPTED, UNCERTAIN, ANSWERED, UNANSWERED, REFUSED, ABANDONED };
mtype = { NO_ENTRY, PENDING, POSTED };
mtype = { NOTHING, COMING, MADE, MADE_AGAIN, TAKEN, LOST };
#define IS_KEPT(b)     (event[b] == MADE_AGAIN || event[b] == TAKEN)

/* SQL. Each payment may lead one refresh, and each refresh bring one balance: all three have its number. */
mtype pay[2] = NONE;
bool own[2];                     /* wants a balance no older than itself; else any that comes serves */
mtype refresh[2] = UNWRITTEN;
byte calls[2];                   /* of the refresh, those that may be charged */
byte called[2];                  /* the payments that were there when its first call went out */
byte latest;                     /* the refresh that was called last */
mtype entry[4] = NO_ENTRY;       /* fee entries: two calls of each refresh; one that is void makes room */
bool applied[2];                 /* a balance that was kept */
byte answers[2];                 /* 1 + the refresh that a balance was found to answer */

/* The broker. What Redis loses is lost; jobs are the payments service's to send again. */
bool job[2] = true;
bool call_message[2], apply_message[2];

/* The world outside */
bool on_the_wire[2];             /* a worker that lives is at this refresh's call */
mtype event[2] = NOTHING;        /* a webhook: on its way, there, kept and to come again, kept and answered with 2xx */
byte asked[2];                   /* the payments that were there when the balance was made */
byte explains[2];                /* the refreshes whose call had gone out by then */
byte accepted;                   /* calls that the provider will charge */

byte faults = FAULTS;
bool emptied;                    /* Redis was: what a worker had taken from it does not come back */

inline settle(who) {
  assert(WAITS(who));                                           /* one outcome */
  pay[who] = SETTLED;
  if
  :: ALL_SETTLED -> called[0] = 0; called[1] = 0; asked[0] = 0; asked[1] = 0; answers[0] = 0; answers[1] = 0
  :: else                                                       /* nobody looks at these again */
  fi
}

inline fail_all() {
  if :: WAITS(0) -> settle(0) :: else fi;
  if :: WAITS(1) -> settle(1) :: else fi
}

inline wake(held) {                                               /* it waited for the end of the one in flight */
  if :: refresh[held] == REQUESTED -> call_message[held] = true :: else fi
}

/* --- initiate --- */

proctype initiate(bit i) {
end:
  do
  :: atomic { job[i] ->
       if :: pay[i] == NONE -> pay[i] = WAITING :: else fi;
       if
       :: WAITS(i) -> call_message[i] = true                    /* it leads */
       :: skip                                                  /* it joins another: what Redis says may be wrong */
       fi;
       if
       :: faults > 0 -> faults--                                /* the job comes back */
       :: job[i] = false
       fi }
  od
}

/* --- call --- */

#define KILLED  faults > 0 -> faults--; on_the_wire[r] = false; \
                if :: emptied :: !emptied -> call_message[r] = true fi; k = 0; status = NONE; goto idle

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
    :: (refresh[r] == UNWRITTEN || refresh[r] == REQUESTED) && ANY_WAITS && FLIES(1-r) ->
         if
         :: !SUITS_ALL(1-r) -> refresh[r] = REQUESTED           /* held until that one is over */
         :: SUITS_ALL(1-r) && refresh[r] == REQUESTED -> refresh[r] = ABANDONED
         :: else
         fi;
         goto idle
#endif
    :: else ->
         if :: calls[r] == 0 -> called[r] = THERE; latest = r :: else fi;
         k = calls[r]; calls[r]++;
         assert(calls[r] <= MAX_CALLS);
         refresh[r] = CALLING; on_the_wire[r] = true;
#ifndef BREAK_ENTRY_BEFORE_CALL
         entry[2*r + k] = PENDING
#endif
    fi };
  atomic {                                                      /* the call, and what the provider makes of it */
    if
    :: KILLED
    :: true ->
         assert(entry[2*r + k] != NO_ENTRY);                    /* written before */
         assert(!FLIES(1-r) || k > 0);                          /* nobody else's is in flight, but after a lost one */
         if
         :: accepted++; status = ACCEPTED; if :: event[r] == NOTHING -> event[r] = COMING :: skip fi
         :: accepted++; status = UNCERTAIN; if :: event[r] == NOTHING -> event[r] = COMING :: skip fi
         :: status = UNCERTAIN                                  /* not accepted, which nobody knows */
         :: status = REFUSED
         :: faults > 0 -> faults--; status = REQUESTED          /* not accepted, and to be made later */
         fi
    fi };
  atomic {                                                      /* booked; what a balance did meanwhile stays */
    if
    :: KILLED
    :: true ->
         if
         :: status == ACCEPTED -> entry[2*r + k] = POSTED
#ifdef BREAK_UNKNOWN_STAYS_PENDING
         :: status == UNCERTAIN && entry[2*r + k] == PENDING -> entry[2*r + k] = NO_ENTRY
#endif
         :: (status == REFUSED || status == REQUESTED) && entry[2*r + k] == PENDING -> entry[2*r + k] = NO_ENTRY
         :: else
         fi;
         if
         :: refresh[r] == CALLING ->
              refresh[r] = status;
              if
              :: status == REFUSED -> calls[r]--; fail_all(); wake(1-r)
              :: status == REQUESTED -> calls[r]--
              :: else
              fi
         :: else
         fi;
         on_the_wire[r] = false; k = 0; status = NONE; goto idle
    fi }
}

/* --- receive and apply --- */

proctype bank(bit b) {
end:
  do
  :: atomic { event[b] == COMING ->
       event[b] = MADE; asked[b] = THERE * !ALL_SETTLED; explains[b] = (calls[0] > 0) | ((calls[1] > 0) << 1) }
  od
}

proctype web(bit b) {
end:
  do
  :: atomic { event[b] == MADE || event[b] == MADE_AGAIN ->     /* kept, and only then handed over and answered */
       if
#ifndef BREAK_SAFE_BEFORE_2XX
       :: faults > 0 -> faults--; event[b] = MADE_AGAIN; if :: apply_message[b] = true :: skip fi
       :: event[b] = TAKEN; apply_message[b] = true
#else
       :: faults > 0 -> faults--; event[b] = LOST               /* answered, and killed before it is kept */
       :: event[b] = TAKEN; apply_message[b] = true
#endif
       fi }
  od
}

#define MAY_ANSWER(r)  (HAS(explains[b], r) && calls[r] > 0 && refresh[r] != ANSWERED)
#define CALLS_OF(r)    (COUNT(r, PENDING) + COUNT(r, POSTED))
#define IS_FRESH(i)    (!own[i] || (HAS(asked[b], i) && answers[b] > 0 && HAS(called[answers[b] - 1], i)))

inline release(who) {
  if
#ifdef BREAK_FRESHNESS
  :: WAITS(who) ->
#else
  :: WAITS(who) && IS_FRESH(who) ->
#endif
       assert(!own[who] || HAS(asked[b], who));                 /* a balance that is fresh */
       settle(who)
  :: else
  fi
}

inline attribute() {                                            /* to the last call that explains it */
  if
  :: MAY_ANSWER(latest) -> answers[b] = 1 + latest
  :: !MAY_ANSWER(latest) && MAY_ANSWER(1-latest) -> answers[b] = 2 - latest
  :: else
  fi;
  if
  :: answers[b] > 0 ->
       f = answers[b] - 1;
       if                                                       /* a call is posted if no other can be the one */
       :: CALLS_OF(f) + MAY_ANSWER(1-f) * CALLS_OF(1-f) == 1 && entry[2*f] == PENDING -> entry[2*f] = POSTED
       :: CALLS_OF(f) + MAY_ANSWER(1-f) * CALLS_OF(1-f) == 1 && entry[2*f + 1] == PENDING -> entry[2*f + 1] = POSTED
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
       release(0); release(1);
       applied[b] = true; explains[b] = 0; answers[b] = answers[b] * !ALL_SETTLED;
       if
       :: faults > 0 -> faults--; if :: emptied :: !emptied -> apply_message[b] = true fi
       :: wake(0); wake(1)
       fi }
  od
}

/* --- time passes --- */

proctype expire(bit i) {
end:
  do
#ifndef BREAK_DEADLINE
#ifdef BREAK_ONE_WRITE_DECIDES
  :: WAITS(i) -> settle(i)                                      /* seen waiting, then written: two steps */
#else
  :: atomic { WAITS(i) -> settle(i) }
#endif
#endif
  :: atomic { WAITS(i) && !SERVED(i) && refresh[i] == UNWRITTEN && !call_message[i] -> call_message[i] = true }
  od
}

#define IS_LEFT(r)     (refresh[r] == REQUESTED && !call_message[r] && !FLIES(1-r))
#define IS_LOST(r)     (refresh[r] == CALLING && !on_the_wire[r])
#ifdef BREAK_ONE_REPEAT
#define MAY_REPEAT(r)  ANY_WAITS
#else
#define MAY_REPEAT(r)  (calls[r] < MAX_CALLS && ANY_WAITS)
#endif

proctype sweep(bit r) {
end:
  do
  :: atomic { IS_KEPT(r) && !applied[r] && !apply_message[r] -> apply_message[r] = true }
#ifndef BREAK_SWEEP
  :: atomic { IS_LEFT(r) && ANY_WAITS -> call_message[r] = true }
  :: atomic { refresh[r] == REQUESTED && !ANY_WAITS -> refresh[r] = ABANDONED }
  :: atomic { IS_LOST(r) -> refresh[r] = UNCERTAIN }
  :: atomic { refresh[r] == UNCERTAIN && MAY_REPEAT(r) -> refresh[r] = REQUESTED; call_message[r] = true }
  :: atomic { refresh[r] == ACCEPTED || (refresh[r] == UNCERTAIN && !MAY_REPEAT(r)) ->
       refresh[r] = UNANSWERED; wake(1-r) }
#endif
  od
}

/* --- Redis is emptied, once --- */

proctype redis_emptied() {
end:
  atomic { faults > 0 ->
    faults--; emptied = true;
    call_message[0] = false; call_message[1] = false; apply_message[0] = false; apply_message[1] = false }
}

/* --- deliver, when nothing else can happen any more, as nothing depends on it; then see what must hold --- */

inline deliver(i) {
  due = true; told = false; cut = true;                         /* due since it was settled, in one transaction */
  do
  :: due ->
#ifdef BREAK_TOLD_THEN_NOTED
       due = false;
       if :: cut -> cut = false :: told = true fi
#else
       told = true;
       if :: cut -> cut = false :: due = false fi               /* killed between the two: it is told again */
#endif
  :: !due -> break
  od;
  assert(told)
}

proctype end_of_it() {
  bool due, told, cut;
end:
  atomic { timeout ->
    assert(pay[0] == SETTLED && pay[1] == SETTLED);             /* none is forgotten */
    deliver(0); deliver(1);
    assert(!IS_OPEN(0) && !IS_OPEN(1));                         /* else the account would not be called again */
    assert(event[0] != LOST && event[1] != LOST);               /* a 2xx only for what is safe */
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
    run redis_emptied(); run end_of_it() }
}
