"""All uses of a task's result that Celery supports, with a payment as the task.

Each primitive is built twice: its payments are released, or those with `may_fail` fail. The first two arguments of
`primitive` name the notes that must be called then.
"""

import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from celery import chain, chord, group
from celery.canvas import Signature
from celery.exceptions import CPendingDeprecationWarning

from tests.suspension.primitive_kit import Kit, Primitive

PRIMITIVES: list[Primitive] = []
Build = Callable[[Kit], Signature]


def primitive(
    released: str,
    failed: str,
    *,
    once: str = "",
    first: str = "",
    joined: str = "",
    has_result: bool = True,
    hangs: bool = False,
) -> Callable[[Build], Build]:
    """Return a decorator that adds a primitive to the list."""

    def add(build: Build) -> Build:
        PRIMITIVES.append(
            Primitive(
                build.__name__.replace("_", " "),
                build,
                released=frozenset(released.split()),
                failed=frozenset(failed.split()),
                once=frozenset(once.split()),
                first=frozenset(first.split()),
                joined=frozenset((joined or once).split()),
                has_result=has_result,
                hangs=hangs,
            )
        )
        return build

    return add


@primitive("", "")
def alone(kit: Kit) -> Signature:
    return kit.pay()


@primitive("next", "errback")
def link_and_link_error(kit: Kit) -> Signature:
    return kit.pay(link=kit.note("next"), link_error=kit.note("errback"))


@primitive("a b c", "x y")
def several_links_and_errbacks(kit: Kit) -> Signature:
    links = [kit.note("a"), kit.note("b", immutable=True), kit.note("c", args=("more",))]
    return kit.pay(link=links, link_error=[kit.note("x"), kit.note("y", immutable=True)])


@primitive("", "new old")
def new_style_errback(kit: Kit) -> Signature:
    return kit.pay(link_error=[kit.new_style("new"), kit.note("old")])


@primitive("soon", "errback")
def link_with_countdown(kit: Kit) -> Signature:
    return kit.pay(link=kit.note("soon", countdown=1), link_error=kit.note("errback", countdown=1))


@primitive("typed", "")
def link_with_typed_arguments_and_expires(kit: Kit) -> Signature:
    when = datetime(2100, 1, 1, tzinfo=UTC)
    args = (when, Decimal("1.10"), UUID(int=7), b"bytes")
    return kit.pay(link=kit.note("typed", args=args, expires=when))


@primitive("a b", "")
def link_to_a_chain(kit: Kit) -> Signature:
    return kit.pay(link=chain(kit.note("a"), kit.note("b"), app=kit.app))


@primitive("a b c", "")
def link_to_a_group_and_a_task(kit: Kit) -> Signature:
    return kit.pay(link=[group(kit.note("a"), kit.note("b"), app=kit.app), kit.note("c")])


@primitive("a b body", "", joined="body")
def link_to_a_chord(kit: Kit) -> Signature:
    return kit.pay(link=chord([kit.note("a"), kit.note("b")], kit.note("body"), app=kit.app))


@primitive("next after", "")
def links_of_a_link(kit: Kit) -> Signature:
    return kit.pay(link=kit.note("next", link=kit.note("after")))


@primitive("unrouted", "errback")
def link_without_a_queue(kit: Kit) -> Signature:
    return kit.pay(link=kit.note("unrouted", queue=None), link_error=kit.note("errback", queue=None))


@primitive("a b", "errback")
def chain_first(kit: Kit) -> Signature:
    return chain(kit.pay(link_error=kit.note("errback")), kit.note("a"), kit.note("b"), app=kit.app)


@primitive("job a b", "job errback", first="job")
def chain_middle(kit: Kit) -> Signature:
    job = kit.note("job", returns=kit.job())
    return chain(job, kit.initiate(link_error=kit.note("errback")), kit.note("a"), kit.note("b"), app=kit.app)


@primitive("job", "job errback", first="job")
def chain_last(kit: Kit) -> Signature:
    return chain(kit.note("job", returns=kit.job()), kit.initiate(link_error=kit.note("errback")), app=kit.app)


@primitive("a job b", "")
def two_payments_in_a_chain(kit: Kit) -> Signature:
    then = kit.job("then", starts_later=True)
    return chain(
        kit.pay(),
        kit.note("a"),
        kit.note("job", returns=then),
        kit.initiate(),
        kit.note("b", immutable=True),
        app=kit.app,
    )


@primitive("a b c", "a", first="a")
def immutable_signatures(kit: Kit) -> Signature:
    return chain(kit.note("a"), kit.pay(immutable=True), kit.note("b", immutable=True), kit.note("c"), app=kit.app)


@primitive("next", "errback")
def on_error_of_a_chain(kit: Kit) -> Signature:
    return chain(kit.pay(), kit.note("next"), app=kit.app).on_error(kit.note("errback"))


@primitive("a b", "errback b")
def group_of_payments(kit: Kit) -> Signature:
    may_fail = kit.pay(link=kit.note("a"), link_error=kit.note("errback"))
    return group(may_fail, kit.pay("good", may_fail=False, link=kit.note("b")), kit.pay("third"), app=kit.app)


@primitive("", "errback")
def link_error_of_a_group(kit: Kit) -> Signature:
    payments = group(kit.pay(), kit.pay("good", may_fail=False), app=kit.app)
    payments.link_error(kit.note("errback"))
    return payments


@primitive("a b", "", hangs=True)
def group_at_the_end_of_a_chain(kit: Kit) -> Signature:
    return chain(kit.pay(), group(kit.note("a"), kit.note("b"), app=kit.app), app=kit.app)


@primitive("x body", "x errback", first="x", once="body errback", joined="body")
def chord_header(kit: Kit) -> Signature:
    header = [kit.pay(), kit.note("x"), kit.pay("good", may_fail=False), kit.pay("third", may_fail=False)]
    return chord(header, kit.note("body", link_error=kit.note("errback")), app=kit.app)


@primitive("body", "errback", once="body errback")
def chord_with_on_error(kit: Kit) -> Signature:
    payments = chord([kit.pay(), kit.pay("good", may_fail=False)], kit.note("body"), app=kit.app)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CPendingDeprecationWarning)  # about a change in a later release
        return payments.on_error(kit.note("errback"))


@primitive("a b next", "a b errback", first="a b", joined="pay")
def chord_body(kit: Kit) -> Signature:
    body = kit.pay(immutable=True, link=kit.note("next"), link_error=kit.note("errback"))
    return chord([kit.note("a"), kit.note("b")], body, app=kit.app)


@primitive("job next", "", joined="then")
def chord_header_and_body(kit: Kit) -> Signature:
    header = [chain(kit.pay(), kit.note("job", immutable=True), app=kit.app), kit.pay("good", may_fail=False)]
    body = kit.pay("then", starts_later=True, immutable=True, link=kit.note("next"))
    return chord(header, body, app=kit.app)


@primitive("a b", "", once="a b")
def chord_whose_body_is_a_group(kit: Kit) -> Signature:
    body = group(kit.note("a"), kit.note("b"), app=kit.app)
    return chord([kit.pay(), kit.pay("good", may_fail=False)], body, app=kit.app)


@primitive("a b", "errback", once="a b errback")
def chord_whose_body_is_a_chain(kit: Kit) -> Signature:
    body = chain(kit.note("a"), kit.note("b"), app=kit.app).on_error(kit.note("errback"))
    return chord([kit.pay(), kit.pay("good", may_fail=False)], body, app=kit.app)


@primitive("x inner outer", "x", first="x", once="inner outer", hangs=True)
def chord_in_a_chord(kit: Kit) -> Signature:
    inner = chord([kit.pay(), kit.note("x")], kit.note("inner"), app=kit.app)
    return chord([inner, kit.pay("good", may_fail=False)], kit.note("outer"), app=kit.app)


@primitive("body after", "", once="body after", joined="body")
def group_then_tasks(kit: Kit) -> Signature:
    payments = group(kit.pay(), kit.pay("good", may_fail=False), app=kit.app)
    return chain(payments, kit.note("body"), kit.note("after"), app=kit.app)


@primitive("begin a b c d body after", "begin b c d", first="begin b c", once="body after d", joined="d body")
def chains_in_groups_in_chains(kit: Kit) -> Signature:
    inner = group(kit.pay("deep", may_fail=False, immutable=True), kit.note("c"), app=kit.app)
    return chain(
        kit.note("begin"),
        group(
            chain(kit.pay(immutable=True), kit.note("a"), app=kit.app),
            chain(kit.note("b"), inner, kit.note("d"), app=kit.app),
            app=kit.app,
        ),
        kit.note("body"),
        kit.note("after"),
        app=kit.app,
    )


@primitive("next", "errback")
def stamps(kit: Kit) -> Signature:
    stamped = chain(kit.pay(link_error=kit.note("errback")), kit.note("next"), app=kit.app)
    stamped.stamp(order="order-7", batch=["b1", "b2"])
    return stamped


@primitive("next", "errback")
def headers(kit: Kit) -> Signature:
    traced: dict[str, Any] = {"headers": {"trace": "of-callback"}}
    return kit.pay(
        headers={"trace": "of-payment"}, link=kit.note("next", **traced), link_error=kit.note("errback", **traced)
    )


@primitive("urgent usual", "errback")
def priority(kit: Kit) -> Signature:
    links = [kit.note("urgent", priority=6), kit.note("usual")]
    return kit.pay(priority=3, link=links, link_error=kit.note("errback", priority=9))


@primitive("linked a", "errback", has_result=False)
def ignore_result(kit: Kit) -> Signature:
    payment = kit.pay(ignore_result=True, link=kit.note("linked"), link_error=kit.note("errback"))
    return chain(payment, kit.note("a", ignore_result=True), app=kit.app)


@primitive("body", "", once="body")
def ignore_result_in_a_chord(kit: Kit) -> Signature:
    header = [kit.pay(ignore_result=True), kit.pay("good", may_fail=False, ignore_result=True)]
    return chord(header, kit.note("body"), app=kit.app)


@primitive("before next", "before errback", first="before")
def replaced_by_a_payment(kit: Kit) -> Signature:
    other = kit.pay(link_error=kit.note("errback"))
    kwargs = {"tag": kit.tag, "mark": "before", "other": other}
    return chain(kit.app.signature("ledger.replace_itself", kwargs=kwargs, queue="svc"), kit.note("next"), app=kit.app)


@primitive("next", "errback")
def expires(kit: Kit) -> Signature:
    return chain(kit.pay(expires=3600, link_error=kit.note("errback")), kit.note("next", expires=3600), app=kit.app)
