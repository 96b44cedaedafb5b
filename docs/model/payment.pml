/* One account, two payments, two workers, one crash, one loss of Redis: every order of their steps.
 *
 * A step is what happens in one transaction, or one send: between two of them a worker may be killed (`crash`), and
 * its message comes back. Time is free: a deadline, a window, a grace time may be over at any moment.
 *
 *     spin -a payment.pml && gcc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000
 */

#define N 2            /* payments */
#define WORKERS 2
#define MAX_CALLS 2    /* of one refresh whose fate may be unknown: worker/payment.py */

#define WAITS(i)  (pay[i] == WAITING)
#define ANY_WAITS (WAITS(0) || WAITS(1))

mtype = { NONE, WAITING, RELEASED, FAILED };
mtype = { UNWRITTEN, REQUESTED, CALLING, ACCEPTED, UNCERTAIN, ANSWERED, UNANSWERED, REFUSED };

/* SQL */
mtype pay[N] = NONE;
bool reply_due[N];
mtype refresh = UNWRITTEN;
byte calls;                        /* of the refresh, those that may be charged */
byte entries, posted, voided;      /* fee entries: all, and by how they were closed */
bool kept, applied;                /* the balance */

/* Redis: may be emptied once */
bool is_led;
byte call_messages, apply_messages;
bool can_flush = true;

/* The broker's jobs, which the payments service would send again */
bool job[N] = true;

/* The world outside */
byte accepted;                     /* calls that the provider will charge */
bool event;                        /* a webhook that was not answered with 2xx yet */
bool on_the_wire;                  /* a worker is making the call */
mtype told[N] = NONE;
byte settlements[N];

byte crashes = 1;

inline crash() {
  if
  :: crashes > 0 -> crashes--; goto idle
  :: true
  fi
}

inline settle(i, state) {
  pay[i] = state; settlements[i]++; reply_due[i] = true;
  assert(settlements[i] == 1)                          /* one outcome */
}

inline deliver(i) {
  if
  :: atomic { reply_due[i] -> assert(told[i] == NONE || told[i] == pay[i]); told[i] = pay[i] }  /* and no other */
     crash();                                          /* told, and not noted: the sweep tells it again */
     reply_due[i] = false
  :: else
  fi
}

active [WORKERS] proctype worker() {
  byte i;
  bool leads, was_accepted, was_answered;
idle:
end:
  do
  :: atomic { job[0] -> job[0] = false; i = 0 }; goto initiate
  :: atomic { job[1] -> job[1] = false; i = 1 }; goto initiate
  :: atomic { call_messages > 0 -> call_messages-- }; goto call
  :: atomic { apply_messages > 0 -> apply_messages-- }; goto apply
  :: atomic { WAITS(0) -> settle(0, FAILED) }; goto tell                 /* deadlines */
  :: atomic { WAITS(1) -> settle(1, FAILED) }; goto tell
  :: reply_due[0] -> goto tell                                              /* the sweep: what was not told */
  :: reply_due[1] -> goto tell
  od;

tell:
  deliver(0); deliver(1);
  goto idle;

initiate:
  atomic {                                             /* one transaction; Redis is asked within it */
    leads = false;
    if
    :: pay[i] == NONE -> pay[i] = WAITING; leads = !is_led; is_led = true
    :: else
    fi
  }
  if
  :: crashes > 0 -> crashes--; job[i] = true; goto idle  /* its message comes back */
  :: true
  fi;
  atomic { if :: leads && call_messages < 2 -> call_messages++ :: else fi }
  goto idle;

call:
  atomic {                                             /* the claim, and the fee entry */
    if
    :: (refresh == UNWRITTEN || refresh == REQUESTED) && ANY_WAITS ->
         refresh = CALLING; calls++; entries++; on_the_wire = true
    :: else -> goto idle
    fi
  }
  if
  :: crashes > 0 -> crashes--; on_the_wire = false; goto idle
  :: true
  fi;
  atomic {                                             /* the call, and what the provider makes of it */
    assert(entries > accepted + voided);               /* written before */
    assert(calls <= MAX_CALLS);
    was_accepted = false; was_answered = true;
    if
    :: accepted++; event = true; was_accepted = true   /* 202, and the event will come */
    :: accepted++; was_accepted = true                 /* 202, and no event */
    :: accepted++; event = true; was_answered = false  /* accepted, and the answer is lost */
    :: was_answered = false                            /* 500: not accepted, which nobody knows */
    :: skip                                            /* 403 */
    fi
  }
  if
  :: crashes > 0 -> crashes--; on_the_wire = false; goto idle
  :: true
  fi;
  atomic {                                             /* booked, if the refresh is still as it was claimed */
    on_the_wire = false;
    if
    :: was_answered && was_accepted -> posted++; if :: refresh == CALLING -> refresh = ACCEPTED :: else fi
    :: was_answered && !was_accepted ->
         voided++;
         if :: refresh == CALLING -> refresh = REFUSED :: else fi;
         if :: WAITS(0) -> settle(0, FAILED) :: else fi;
         if :: WAITS(1) -> settle(1, FAILED) :: else fi
    :: else -> if :: refresh == CALLING -> refresh = UNCERTAIN :: else fi
    fi
  }
  crash();
  deliver(0); deliver(1);
  goto idle;

apply:
  atomic {
    if
    :: kept ->
         if :: WAITS(0) -> settle(0, RELEASED) :: else fi;
         if :: WAITS(1) -> settle(1, RELEASED) :: else fi;
         applied = true;
         if
         :: refresh != UNWRITTEN && refresh != REFUSED -> refresh = ANSWERED
         :: else
         fi
    :: else
    fi
  }
  crash();
  deliver(0); deliver(1);
  goto idle
}

active proctype webhook() {
end:
  do
  :: atomic { event -> kept = true; applied = false };  /* committed; a 2xx only after the hand-over */
     if
     :: crashes > 0 -> crashes--                        /* no 2xx: the event comes again */
     :: atomic { if :: apply_messages < 1 -> apply_messages++ :: else fi; event = false }
     fi
  od
}

active proctype sweep() {
end:
  do
  :: atomic { kept && !applied && apply_messages == 0 -> apply_messages++ }
  :: atomic { ANY_WAITS && (refresh == UNWRITTEN || refresh == REQUESTED) && call_messages == 0 -> call_messages++ }
  :: atomic { refresh == CALLING && !on_the_wire -> refresh = UNCERTAIN }        /* its worker was lost */
  :: atomic { refresh == UNCERTAIN && calls < MAX_CALLS && ANY_WAITS -> refresh = REQUESTED }
  :: atomic { (refresh == ACCEPTED || refresh == UNCERTAIN) && !on_the_wire -> refresh = UNANSWERED }
  od
}

active proctype flush() {
  atomic { can_flush = false; is_led = false; call_messages = 0; apply_messages = 0 }
}

active proctype watch() {
end:
  do
  :: timeout ->                                          /* nothing more can happen */
       assert(pay[0] == RELEASED || pay[0] == FAILED);   /* none is forgotten */
       assert(pay[1] == RELEASED || pay[1] == FAILED);
       assert(told[0] == pay[0] && told[1] == pay[1]);
       assert(posted <= accepted && accepted <= entries - voided);
       break
  od
}
