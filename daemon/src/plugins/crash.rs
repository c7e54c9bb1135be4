//! Decides whether a crashed plugin is started again or quarantined. Pure.
//!
//! ```text
//!   crash -> fewer than `limit` in `window`?  yes: start after base * 2^(n-1), at most `cap`
//!                                             no:  quarantine until `plugin enable`
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The limits and delays of restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrashPolicy {
    /// The number of crashes within the window that leads to quarantine.
    pub limit: usize,
    /// How long a crash counts.
    pub window: Duration,
    /// The delay after the first crash; each further crash doubles it.
    pub backoff_base: Duration,
    /// The longest delay.
    pub backoff_cap: Duration,
}

impl Default for CrashPolicy {
    fn default() -> Self {
        Self {
            limit: 5,
            window: Duration::from_secs(600),
            backoff_base: Duration::from_millis(500),
            backoff_cap: Duration::from_secs(60),
        }
    }
}

/// The decision after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterCrash {
    /// Start it again after this delay.
    Restart(Duration),
    Quarantine,
}

/// The crashes within the window.
#[derive(Debug, Clone, Default)]
pub struct CrashHistory {
    times: VecDeque<Instant>,
}

impl CrashHistory {
    /// Counts a crash at `now` and decides.
    pub fn record(&mut self, now: Instant, policy: &CrashPolicy) -> AfterCrash {
        self.times.retain(|time| now.saturating_duration_since(*time) < policy.window);
        self.times.push_back(now);
        let crashes = self.times.len();
        if crashes >= policy.limit {
            return AfterCrash::Quarantine;
        }
        let doublings = u32::try_from(crashes - 1).unwrap_or(u32::MAX).min(31);
        let delay = policy.backoff_base.saturating_mul(1 << doublings);
        AfterCrash::Restart(delay.min(policy.backoff_cap))
    }

    /// Forgets all crashes.
    pub fn clear(&mut self) {
        self.times.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_doubles_up_to_its_cap_and_then_comes_quarantine() {
        let policy = CrashPolicy {
            limit: 5,
            window: Duration::from_secs(600),
            backoff_base: Duration::from_secs(1),
            backoff_cap: Duration::from_secs(5),
        };
        let start = Instant::now();
        let mut history = CrashHistory::default();
        let mut decisions = Vec::new();
        for second in 0..5 {
            decisions.push(history.record(start + Duration::from_secs(second), &policy));
        }
        let restart = |seconds| AfterCrash::Restart(Duration::from_secs(seconds));
        assert_eq!(decisions, [restart(1), restart(2), restart(4), restart(5), AfterCrash::Quarantine]);
        history.clear();
        assert_eq!(history.record(start, &policy), restart(1));
    }

    #[test]
    fn crashes_outside_the_window_do_not_count() {
        let policy = CrashPolicy::default();
        let start = Instant::now();
        let mut history = CrashHistory::default();
        for round in 0..50 {
            let decision = history.record(start + policy.window * round, &policy);
            assert_eq!(decision, AfterCrash::Restart(policy.backoff_base));
        }
    }
}
