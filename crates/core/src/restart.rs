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
//! An agent that *goes on* is started by its resume command, where it has one, with the context of
//! the last checkpoint.

use fermata_protocol::UnixMillis;
use fermata_protocol::agent::AgentSpec;
use fermata_protocol::supervision::{Recover, Restart, RestartPolicy};
use serde::{Deserialize, Serialize};

/// How a run ended, as far as the policy cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with exit code 0.
    Well,
    /// By itself in another way, or it never came to run or to be ready.
    Badly,
    /// The machine or its shim went down under it.
    Interrupted,
}

/// How an agent is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Again {
    /// By its own command, as the first time.
    Anew,
    /// By its resume command where there is one, with the last checkpoint's context.
    GoesOn,
}

/// The starts in a row by policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Row {
    /// How many.
    pub starts: u32,
    /// When the first of them was decided.
    pub since: UnixMillis,
}

/// What the policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It stays ended.
    Stay,
    /// It is started again.
    Start {
        /// How.
        again: Again,
        /// When.
        until: UnixMillis,
        /// Which start in the row it is, from 1.
        start: u32,
    },
    /// It has been started too often.
    TooOften {
        /// How often.
        starts: u32,
    },
}

/// Decides what becomes of an agent that has ended without anybody having wanted it.
///
/// `seed` is a text that differs between agents; the jitter comes from it.
pub fn verdict(spec: &AgentSpec, end: End, row: Row, now: UnixMillis, seed: &str) -> Verdict {
    let restart = &spec.supervision.restart;
    let again = match (end, restart.policy) {
        (End::Well, RestartPolicy::Always) => Again::Anew,
        (End::Badly, RestartPolicy::OnFailure | RestartPolicy::Always) => Again::GoesOn,
        (End::Interrupted, _) if recovers(spec) => Again::GoesOn,
        (End::Well, RestartPolicy::No | RestartPolicy::OnFailure)
        | (End::Badly, RestartPolicy::No)
        | (End::Interrupted, _) => return Verdict::Stay,
    };
    let row = match one_more(restart, row, now) {
        Ok(row) => row,
        Err(too_often) => return too_often,
    };
    // What went down with the machine is not at fault: its first return does not wait.
    let wait = match (end, row.starts) {
        (End::Interrupted, 1) => 0,
        _ => delay_ms(restart, row.starts, seed),
    };
    Verdict::Start { again, until: UnixMillis(now.0.saturating_add(wait)), start: row.starts }
}

/// Decides what becomes of an agent that was stopped because it was stale: it is started again
/// whatever its policy, at once, but not more often than its restarts may be.
pub fn after_stale(restart: &Restart, row: Row, now: UnixMillis) -> Verdict {
    match one_more(restart, row, now) {
        Ok(row) => Verdict::Start { again: Again::GoesOn, until: now, start: row.starts },
        Err(too_often) => too_often,
    }
}

/// Returns the row with one more start, or the verdict that this would be too many; a row that is
/// older than its time begins anew.
fn one_more(restart: &Restart, row: Row, now: UnixMillis) -> Result<Row, Verdict> {
    let over = now.since(row.since) > i64::try_from(restart.within_ms).unwrap_or(i64::MAX);
    let row =
        if row.starts == 0 || over { Row { starts: 1, since: now } } else { Row { starts: row.starts + 1, ..row } };
    if restart.limit > 0 && row.starts > restart.limit {
        return Err(Verdict::TooOften { starts: restart.limit });
    }
    Ok(row)
}

/// Says whether an agent that was interrupted is brought back.
pub fn recovers(spec: &AgentSpec) -> bool {
    match spec.supervision.recover {
        Recover::Always => true,
        Recover::Never => false,
        Recover::Auto => {
            spec.supervision.restart.policy != RestartPolicy::No || spec.resume_argv.is_some() || spec.profile.is_some()
        }
    }
}

/// Returns the wait before a start, milliseconds: it doubles with each, and is cut by up to a quarter.
fn delay_ms(restart: &Restart, start: u32, seed: &str) -> i64 {
    let doubled = restart.delay_ms.saturating_mul(1_u64.checked_shl(start.saturating_sub(1)).unwrap_or(u64::MAX));
    let longest = doubled.min(restart.max_delay_ms);
    let cut = longest / 4;
    let taken = if cut == 0 { 0 } else { fnv1a(seed) % (cut + 1) };
    i64::try_from(longest - taken).unwrap_or(i64::MAX)
}

/// The 64-bit FNV-1a hash: good enough to spread agents that failed together
/// (<http://www.isthe.com/chongo/tech/comp/fnv/>).
fn fnv1a(text: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    // The low bits alone are used: let the high ones take part.
    hash ^ (hash >> 32)
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
        use Again::{Anew, GoesOn};
        let table = [
            (End::Well, RestartPolicy::No, None),
            (End::Well, RestartPolicy::OnFailure, None),
            (End::Well, RestartPolicy::Always, Some(Anew)),
            (End::Badly, RestartPolicy::No, None),
            (End::Badly, RestartPolicy::OnFailure, Some(GoesOn)),
            (End::Badly, RestartPolicy::Always, Some(GoesOn)),
            (End::Interrupted, RestartPolicy::No, None),
            (End::Interrupted, RestartPolicy::OnFailure, Some(GoesOn)),
            (End::Interrupted, RestartPolicy::Always, Some(GoesOn)),
        ];
        for (end, policy, wanted) in table {
            let found = match verdict(&spec(policy), end, Row::default(), NOW, "a") {
                Verdict::Stay => None,
                Verdict::Start { again, .. } => Some(again),
                Verdict::TooOften { .. } => panic!("the first start is not too often"),
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
        let row = Row { starts: 3, since: NOW };
        let soon = UnixMillis(NOW.0 + 1_000);
        assert_eq!(verdict(&spec, End::Badly, row, soon, "a"), Verdict::TooOften { starts: 3 });
        let later = UnixMillis(NOW.0 + 600_001);
        assert!(matches!(verdict(&spec, End::Badly, row, later, "a"), Verdict::Start { start: 1, .. }));
    }
}
