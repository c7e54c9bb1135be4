//! Properties of the retention, over random checkpoints, policies and times.

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::*;

const TRIGGERS: [Trigger; 7] = [
    Trigger::Manual,
    Trigger::Auto,
    Trigger::PhaseTransition,
    Trigger::Pause,
    Trigger::Timeout,
    Trigger::Shutdown,
    Trigger::Safety,
];

/// The last moment at which a random checkpoint was made.
const NOW: i64 = 1_800_000_000_000;

fn point(number: u64, trigger: Trigger, age_ms: i64) -> RetentionCandidate {
    RetentionCandidate { number, trigger, created_at: UnixMillis(NOW - age_ms), pinned: false, bytes: 10 }
}

/// Checkpoints in the order of their creation, by a clock that is sometimes set back.
fn points() -> impl Strategy<Value = Vec<RetentionCandidate>> {
    let one = (0_usize..7, 1_i64..40_000_000, 0_u32..10, 0_u64..1000, 0_u32..40);
    vec(one, 0..120).prop_map(|all| {
        let total: i64 = all.iter().map(|(_, step, ..)| *step).sum();
        let mut at = NOW - total;
        let mut number = 0;
        let mut made = Vec::new();
        for (trigger, step, pin, bytes, back) in all {
            at += if back == 0 { -step } else { step };
            number += 1 + u64::from(pin % 3 == 0);
            let created_at = UnixMillis(at.min(NOW));
            made.push(RetentionCandidate { number, trigger: TRIGGERS[trigger], created_at, pinned: pin == 1, bytes });
        }
        made
    })
}

fn policies() -> impl Strategy<Value = RetentionPolicy> {
    let count = 0_u64..6;
    let span = 0_u64..(3 * DAY_MS);
    (count.clone(), count.clone(), count, span.clone(), span.clone(), span.clone(), span.clone(), span, 0_u64..8000)
        .prop_map(|(manual, pause, ends, safety, all, ten, hourly, daily, max)| RetentionPolicy {
            keep_manual: manual,
            keep_pause: pause,
            keep_ends: ends,
            keep_safety_ms: safety,
            auto_all_ms: all,
            auto_ten_minutes_ms: ten,
            auto_hourly_ms: hourly,
            auto_daily_ms: daily,
            max_bytes: if max < 1000 { 0 } else { max },
        })
}

fn asks() -> impl Strategy<Value = RemovalRequest> {
    let bounds = (
        proptest::option::of(0_u64..50),
        proptest::option::of(0_u64..(10 * DAY_MS)),
        proptest::option::of(0_u64..20_000),
    );
    prop_oneof![
        policies().prop_map(RemovalRequest::Policy),
        bounds.prop_map(|(keep, older_than_ms, max_bytes)| RemovalRequest::Bounds(RemovalBounds {
            keep,
            older_than_ms,
            max_bytes
        })),
        (0_u64..20_000).prop_map(|bytes| RemovalRequest::Room { bytes, reason: RemovalReason::DiskFloor }),
    ]
}

fn sum(points: &[RetentionCandidate]) -> u64 {
    points.iter().map(|point| point.bytes).sum()
}

fn numbers(removals: &[Removal]) -> BTreeSet<CheckpointNumber> {
    removals.iter().map(|removal| removal.checkpoint.number).collect()
}

fn left(points: &[RetentionCandidate], removals: &[Removal]) -> Vec<RetentionCandidate> {
    let going = numbers(removals);
    points.iter().filter(|point| !going.contains(&point.number)).copied().collect()
}

proptest! {
    #![proptest_config(fermata_test_seeds::cases(256))]

    #[test]
    fn what_is_pinned_or_in_use_and_the_newest_stay(
        points in points(), ask in asks(), used in btree_set(0_u64..200, 0..10), later in 0_i64..10_000_000_000
    ) {
        let going = plan(&points, &ask, sum(&points), &used, UnixMillis(NOW + later));
        for removal in &going {
            prop_assert!(!removal.checkpoint.pinned && !used.contains(&removal.checkpoint.number));
            prop_assert!(Some(removal.checkpoint.number) != points.last().map(|point| point.number));
        }
        prop_assert!(going.windows(2).all(|pair| pair[0].checkpoint.number < pair[1].checkpoint.number), "the oldest first");
    }

    #[test]
    fn a_second_application_removes_nothing(points in points(), policy in policies(), later in 0_i64..10_000_000_000) {
        let (ask, now) = (RemovalRequest::Policy(policy), UnixMillis(NOW + later));
        let rest = left(&points, &plan(&points, &ask, sum(&points), &BTreeSet::new(), now));
        prop_assert_eq!(plan(&rest, &ask, sum(&rest), &BTreeSet::new(), now), vec![]);
    }

    #[test]
    fn thinning_in_steps_leaves_what_thinning_at_once_would(
        points in points(), policy in policies(), first in 0_i64..500_000_000, then in 0_i64..5_000_000_000
    ) {
        let ask = RemovalRequest::Policy(RetentionPolicy { max_bytes: 0, ..policy });
        let (soon, late) = (UnixMillis(NOW + first), UnixMillis(NOW + first + then));
        let at_once = plan(&points, &ask, 0, &BTreeSet::new(), late);
        let early = plan(&points, &ask, 0, &BTreeSet::new(), soon);
        prop_assert!(numbers(&early).is_subset(&numbers(&at_once)), "what is removed early is removed late as well");
        let rest = left(&points, &early);
        let in_steps = left(&rest, &plan(&rest, &ask, 0, &BTreeSet::new(), late));
        prop_assert_eq!(in_steps, left(&points, &at_once));
    }

    #[test]
    fn a_smaller_quota_removes_more_and_reaches_its_bound_where_it_can(
        points in points(), policy in policies(), small in 1_u64..5000, more in 0_u64..5000
    ) {
        let now = UnixMillis(NOW);
        let going = |max_bytes| plan(&points, &RemovalRequest::Policy(RetentionPolicy { max_bytes, ..policy }), sum(&points), &BTreeSet::new(), now);
        let (tight, loose) = (going(small), going(small + more));
        prop_assert!(numbers(&loose).is_subset(&numbers(&tight)));
        let rest = left(&points, &tight);
        let newest = rest.last().map(|point| point.number);
        let removable = rest.iter().any(|point| !point.pinned && Some(point.number) != newest);
        prop_assert!(sum(&rest) <= small || !removable);
    }

    #[test]
    fn each_bound_narrows_what_goes(points in points(), keep in 0_u64..50, age in 0_u64..(10 * DAY_MS), most in 0_u64..20_000) {
        let going = |bounds| numbers(&plan(&points, &RemovalRequest::Bounds(bounds), sum(&points), &BTreeSet::new(), UnixMillis(NOW)));
        let one = RemovalBounds { keep: Some(keep), ..RemovalBounds::default() };
        let two = RemovalBounds { older_than_ms: Some(age), ..one };
        let three = RemovalBounds { max_bytes: Some(most), ..two };
        prop_assert!(going(two).is_subset(&going(one)));
        prop_assert!(going(three).is_subset(&going(two)));
    }
}

#[test]
fn older_checkpoints_are_thinned_more() {
    // One a minute for 40 days: 57,600 of them.
    let minute = 60_000;
    let made: Vec<RetentionCandidate> =
        (0..57_600).map(|n| point(n, Trigger::Auto, (57_599 - i64::try_from(n).unwrap()) * minute)).collect();
    let going = plan(&made, &RemovalRequest::Policy(RetentionPolicy::default()), 0, &BTreeSet::new(), UnixMillis(NOW));
    let rest = left(&made, &going);
    let younger = |least: u64, most: u64| {
        rest.iter().filter(|point| (least..most).contains(&age(point, UnixMillis(NOW)))).count()
    };
    assert_eq!(younger(0, 10 * MINUTE_MS), 10, "all of the last ten minutes");
    assert!((34..=37).contains(&younger(10 * MINUTE_MS, 6 * HOUR_MS)), "one per ten minutes");
    assert!((41..=43).contains(&younger(6 * HOUR_MS, 2 * DAY_MS)), "one per hour");
    assert!((27..=29).contains(&younger(2 * DAY_MS, 31 * DAY_MS)), "one per day");
    assert_eq!(younger(31 * DAY_MS, 1000 * DAY_MS), 0);
}

#[test]
fn the_newest_of_each_trigger_are_kept_by_count() {
    let made: Vec<RetentionCandidate> = (1..=30)
        .map(|n| point(n, if n % 2 == 0 { Trigger::Manual } else { Trigger::Pause }, 1_000 * (30 - n as i64)))
        .collect();
    let policy = RetentionPolicy { keep_manual: 2, keep_pause: 0, ..RetentionPolicy::default() };
    let going = plan(&made, &RemovalRequest::Policy(policy), 0, &BTreeSet::new(), UnixMillis(NOW));
    assert!(going.iter().all(|removal| removal.reason == RemovalReason::Count));
    assert_eq!(left(&made, &going).iter().filter(|p| p.trigger == Trigger::Manual).count(), 2);
    assert_eq!(left(&made, &going).iter().filter(|p| p.trigger == Trigger::Pause).count(), 15, "0 keeps all");
}

#[test]
fn pinned_checkpoints_do_not_count() {
    let mut made: Vec<RetentionCandidate> = (1..=4).map(|n| point(n, Trigger::Manual, 0)).collect();
    made[3].pinned = true;
    let policy = RetentionPolicy { keep_manual: 2, ..RetentionPolicy::default() };
    let going = plan(&made, &RemovalRequest::Policy(policy), 0, &BTreeSet::new(), UnixMillis(NOW));
    assert_eq!(numbers(&going), [1].into());
}

#[test]
fn settings_of_a_project_override_those_of_the_daemon() {
    let own = Retention { keep_manual: Some(3), max_bytes: Some(0), ..Retention::default() };
    let policy = RetentionPolicy { max_bytes: 5, ..RetentionPolicy::default() }.with(&own);
    assert_eq!((policy.keep_manual, policy.keep_pause, policy.quota()), (3, 10, None));
}
