//! The restart policy: whether an agent that has ended is started again, when, and how often.
//!
//! ```text
//!  how it ended                    no      on_failure   always
//!  exit code 0                     stay    stay         anew
//!  another code, a signal,         stay    goes on      goes on
//!   a failed start, never ready
//!  stopped by a person             stay    stay         stay
//!  its time was up                 stay    stay         stay
//!  interrupted                     by `recover`: goes on, or stay
//! ```
//!
//! An agent that *goes on* is started by its resume command, if it has one, with the context of the last checkpoint;
//! *anew* means by its first command.

use fermata_protocol::UnixMillis;
use fermata_protocol::agent::AgentSpec;
use fermata_protocol::supervision::{Recover, Restart, RestartPolicy};
use serde::{Deserialize, Serialize};

use crate::clock::millis;
use crate::hash::fnv1a;

/// How a run ended, as far as the restart policy distinguishes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunOutcome {
    /// With exit code 0.
    Well,
    /// With another exit code or by a signal, or it never ran or was never ready.
    Badly,
    /// The machine or its shim went down under it.
    Interrupted,
}

/// How an agent is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartKind {
    /// By its own command, as the first time.
    Anew,
    /// By its resume command where there is one, with the last checkpoint's context.
    GoesOn,
}

/// Starts in a row by the restart policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StartStreak {
    pub starts: u32,
    /// When the first of them was decided.
    pub since: UnixMillis,
}

/// What follows from the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartDecision {
    /// The agent stays ended.
    Stay,
    Start {
        restart: RestartKind,
        until: UnixMillis,
        /// Which start of the streak it is, from 1.
        start: u32,
    },
    /// The streak has reached its limit of `starts`.
    TooOften { starts: u32 },
}

/// Decides what follows from the end of a run that no person stopped.
///
/// `seed` is a text that differs between agents; the jitter is derived from it.
pub fn after_end(
    spec: &AgentSpec,
    end: RunOutcome,
    streak: StartStreak,
    now: UnixMillis,
    seed: &str,
) -> RestartDecision {
    let restart = &spec.supervision.restart;
    let kind = match (end, restart.policy) {
        (RunOutcome::Well, RestartPolicy::Always) => RestartKind::Anew,
        (RunOutcome::Badly, RestartPolicy::OnFailure | RestartPolicy::Always) => RestartKind::GoesOn,
        (RunOutcome::Interrupted, _) if recovers(spec) => RestartKind::GoesOn,
        (RunOutcome::Well, RestartPolicy::No | RestartPolicy::OnFailure)
        | (RunOutcome::Badly, RestartPolicy::No)
        | (RunOutcome::Interrupted, _) => return RestartDecision::Stay,
    };
    let streak = match one_more(restart, streak, now) {
        Ok(streak) => streak,
        Err(too_often) => return too_often,
    };
    // The first start after an interruption does not wait: the agent has not failed.
    let wait = match (end, streak.starts) {
        (RunOutcome::Interrupted, 1) => 0,
        _ => delay_ms(restart, streak.starts, seed),
    };
    RestartDecision::Start { restart: kind, until: UnixMillis(now.0.saturating_add(wait)), start: streak.starts }
}

/// Decides what follows from the stop of a stale agent: it is started again whatever its policy, at once, up to the
/// limit of its restarts.
pub fn after_stale(restart: &Restart, streak: StartStreak, now: UnixMillis) -> RestartDecision {
    match one_more(restart, streak, now) {
        Ok(streak) => RestartDecision::Start { restart: RestartKind::GoesOn, until: now, start: streak.starts },
        Err(too_often) => too_often,
    }
}

/// Returns the streak with one more start, or `TooOften`. A streak that has lasted longer than `within_ms` begins again.
fn one_more(restart: &Restart, streak: StartStreak, now: UnixMillis) -> Result<StartStreak, RestartDecision> {
    let over = now.since(streak.since) > millis(restart.within_ms);
    let streak = if streak.starts == 0 || over {
        StartStreak { starts: 1, since: now }
    } else {
        StartStreak { starts: streak.starts + 1, ..streak }
    };
    if restart.limit > 0 && streak.starts > restart.limit {
        return Err(RestartDecision::TooOften { starts: restart.limit });
    }
    Ok(streak)
}

/// Says whether an interrupted agent is started again.
pub fn recovers(spec: &AgentSpec) -> bool {
    match spec.supervision.recover {
        Recover::Always => true,
        Recover::Never => false,
        Recover::Auto => {
            spec.supervision.restart.policy != RestartPolicy::No || spec.resume_argv.is_some() || spec.profile.is_some()
        }
    }
}

/// Returns the wait before a start of the streak: it doubles with each start, and jitter takes off up to a quarter.
fn delay_ms(restart: &Restart, start: u32, seed: &str) -> i64 {
    let doubled = restart.delay_ms.saturating_mul(1_u64.checked_shl(start.saturating_sub(1)).unwrap_or(u64::MAX));
    let longest = doubled.min(restart.max_delay_ms);
    let cut = longest / 4;
    let taken = if cut == 0 { 0 } else { fnv1a(seed) % (cut + 1) };
    i64::try_from(longest - taken).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_protocol::supervision::Supervision;

    fn spec(policy: RestartPolicy) -> AgentSpec {
        let restart = Restart { policy, delay_ms: 1_000, max_delay_ms: 60_000, limit: 3, within_ms: 600_000 };
        AgentSpec {
            argv: vec!["x".into()],
            cwd: "/w".into(),
            umask: 0o022,
            limits: Default::default(),
            resume_argv: None,
            profile: None,
            stop_grace_ms: 10,
            supervision: Box::new(Supervision { restart, ..Supervision::default() }),
        }
    }

    const NOW: UnixMillis = UnixMillis(5_000_000);

    #[test]
    fn the_table_is_the_one_on_top_of_this_file() {
        use RestartKind::{Anew, GoesOn};
        let table = [
            (RunOutcome::Well, RestartPolicy::No, None),
            (RunOutcome::Well, RestartPolicy::OnFailure, None),
            (RunOutcome::Well, RestartPolicy::Always, Some(Anew)),
            (RunOutcome::Badly, RestartPolicy::No, None),
            (RunOutcome::Badly, RestartPolicy::OnFailure, Some(GoesOn)),
            (RunOutcome::Badly, RestartPolicy::Always, Some(GoesOn)),
            (RunOutcome::Interrupted, RestartPolicy::No, None),
            (RunOutcome::Interrupted, RestartPolicy::OnFailure, Some(GoesOn)),
            (RunOutcome::Interrupted, RestartPolicy::Always, Some(GoesOn)),
        ];
        for (end, policy, wanted) in table {
            let found = match after_end(&spec(policy), end, StartStreak::default(), NOW, "a") {
                RestartDecision::Stay => None,
                RestartDecision::Start { restart, .. } => Some(restart),
                RestartDecision::TooOften { .. } => panic!("the first start is not too often"),
            };
            assert_eq!(found, wanted, "{end:?} under {policy:?}");
        }
    }

    #[test]
    fn an_agent_that_can_go_on_recovers_without_a_restart_policy() {
        let mut plain = spec(RestartPolicy::No);
        assert!(!recovers(&plain));
        plain.resume_argv = Some(vec!["x".into()]);
        assert!(recovers(&plain));
        plain.supervision.recover = Recover::Never;
        assert!(!recovers(&plain));
    }

    #[test]
    fn the_wait_doubles_up_to_its_limit_and_differs_between_agents() {
        let restart = spec(RestartPolicy::Always).supervision.restart;
        let mut waits = std::collections::BTreeSet::new();
        for start in 1..80 {
            let full = (1_000_i64 << (start - 1).min(20)).min(60_000);
            let wait = delay_ms(&restart, start, &format!("run-{start}"));
            assert!(wait <= full && wait >= full * 3 / 4, "start {start} waits {wait}");
            waits.insert(wait);
        }
        assert!(waits.len() > 40, "jitter spreads them: {waits:?}");
    }

    #[test]
    fn starts_are_limited_within_their_time() {
        let spec = spec(RestartPolicy::Always);
        let streak = StartStreak { starts: 3, since: NOW };
        let soon = UnixMillis(NOW.0 + 1_000);
        assert_eq!(after_end(&spec, RunOutcome::Badly, streak, soon, "a"), RestartDecision::TooOften { starts: 3 });
        let later = UnixMillis(NOW.0 + 600_001);
        assert!(matches!(
            after_end(&spec, RunOutcome::Badly, streak, later, "a"),
            RestartDecision::Start { start: 1, .. }
        ));
    }
}
