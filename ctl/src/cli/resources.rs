//! What an agent may use, as flags: resources of its tree, its budget, and room for its checkpoints.

use clap::Args;
use fermata_protocol::budget::Budget;
use fermata_protocol::retention::Retention;
use fermata_protocol::supervision::Resources;

use crate::units::{millis, parse_bytes, parse_duration};

/// What an agent's tree may use.
#[derive(Debug, Args, Default)]
pub struct ResourceArgs {
    /// The most memory its whole tree may use, for instance 2G; more, and the tree is killed.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub memory_max: Option<u64>,
    /// How many processor cores its whole tree may use, for instance 1.5.
    #[arg(long, value_name = "CORES", value_parser = parse_cores)]
    pub cpus: Option<u64>,
    /// How many processes and threads its whole tree may have.
    #[arg(long, value_name = "N")]
    pub pids_max: Option<u64>,
}

/// What an agent, or all agents of a project together, may spend; then the project is paused.
#[derive(Debug, Args, Default, Clone, Copy)]
pub struct BudgetArgs {
    /// Tokens that may be used before the project is paused; `none` for no bound.
    #[arg(long, value_name = "N", value_parser = parse_tokens)]
    pub token_budget: Option<Bound>,
    /// US dollars that may be spent before the project is paused, for instance 12.50; `none` for no bound.
    #[arg(long, value_name = "DOLLARS", value_parser = parse_dollars)]
    pub cost_budget: Option<Bound>,
}

/// Which checkpoints of a project are kept, where that differs from the daemon's settings.
#[derive(Debug, Args, Default, Clone, Copy)]
pub struct RetentionArgs {
    /// Keep the newest N manual checkpoints; 0 for all.
    #[arg(long, value_name = "N")]
    pub keep_manual: Option<u64>,
    /// Keep the newest N checkpoints of pauses; 0 for all.
    #[arg(long, value_name = "N")]
    pub keep_pause: Option<u64>,
    /// Keep the newest N checkpoints before timeouts, and of shutdowns; 0 for all.
    #[arg(long, value_name = "N")]
    pub keep_ends: Option<u64>,
    /// Keep safety checkpoints of restores for so long, for instance 7d; 0s for ever.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub keep_safety: Option<std::time::Duration>,
    /// What all checkpoints of the project may take on disk, for instance 5G; 0 for no bound.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub max_checkpoint_bytes: Option<u64>,
}

impl RetentionArgs {
    /// Says whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.over(Retention::default()).is_unset()
    }

    /// Lays what was given over settings.
    #[must_use]
    pub fn over(self, before: Retention) -> Retention {
        Retention {
            keep_manual: self.keep_manual.or(before.keep_manual),
            keep_pause: self.keep_pause.or(before.keep_pause),
            keep_ends: self.keep_ends.or(before.keep_ends),
            keep_safety_ms: self.keep_safety.map(millis).or(before.keep_safety_ms),
            max_bytes: self.max_checkpoint_bytes.or(before.max_bytes),
            ..before
        }
    }
}

/// A bound, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound(pub Option<u64>);

impl BudgetArgs {
    /// Says whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.token_budget.is_none() && self.cost_budget.is_none()
    }

    /// Lays what was given over a budget; a budget that is set anew is waived no longer.
    #[must_use]
    pub fn over(self, mut budget: Budget) -> Budget {
        if let Some(Bound(tokens)) = self.token_budget {
            budget.tokens = tokens;
        }
        if let Some(Bound(cost)) = self.cost_budget {
            budget.cost_micro_usd = cost;
        }
        budget.waived &= self.is_empty();
        budget
    }
}

fn parse_tokens(text: &str) -> Result<Bound, String> {
    if text == "none" {
        return Ok(Bound(None));
    }
    let number = text.replace([',', '_'], "").parse();
    number.map(|n| Bound(Some(n))).map_err(|_| format!("'{text}' is no number of tokens, nor none"))
}

fn parse_dollars(text: &str) -> Result<Bound, String> {
    if text == "none" {
        return Ok(Bound(None));
    }
    let wrong = || format!("'{text}' is no amount of dollars; write for instance 12.50, or none");
    let dollars: f64 = text.trim_start_matches('$').parse().map_err(|_| wrong())?;
    let micro = (dollars * 1e6).round();
    if (0.0..=1e15).contains(&micro) { Ok(Bound(Some(micro as u64))) } else { Err(wrong()) }
}

impl From<ResourceArgs> for Resources {
    fn from(args: ResourceArgs) -> Self {
        Self { memory_max_bytes: args.memory_max, cpu_max_percent: args.cpus, pids_max: args.pids_max }
    }
}

/// Reads a number of cores as percent of one core.
fn parse_cores(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no number of cores; write for instance 2 or 0.5, at least 0.01");
    let cores: f64 = text.trim().parse().map_err(|_| wrong())?;
    let percent = (cores * 100.0).round();
    // Beyond that a float no longer counts exactly; the daemon has its own limit below.
    if (1.0..=1e12).contains(&percent) { Ok(percent as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_in_tokens_and_dollars() {
        assert_eq!(parse_tokens("1_000,000"), Ok(Bound(Some(1_000_000))));
        assert_eq!(parse_dollars("$12.50"), Ok(Bound(Some(12_500_000))));
        assert_eq!((parse_tokens("none"), parse_dollars("none")), (Ok(Bound(None)), Ok(Bound(None))));
        assert!(parse_tokens("-1").is_err() && parse_dollars("-1").is_err() && parse_dollars("NaN").is_err());
        let before = Budget { tokens: Some(1), cost_micro_usd: Some(2), waived: true };
        let args = BudgetArgs { token_budget: Some(Bound(None)), cost_budget: None };
        assert_eq!(args.over(before), Budget { tokens: None, cost_micro_usd: Some(2), waived: false });
        assert_eq!(BudgetArgs::default().over(before), before);
    }

    #[test]
    fn cores_are_read_as_percent_of_one() {
        for (text, percent) in [("1.5", 150), ("0.01", 1), ("2", 200), (" .5", 50)] {
            assert_eq!(parse_cores(text), Ok(percent), "{text}");
        }
        for bad in ["", "0", "0.001", "-1", "two", "NaN", "inf", "1e300"] {
            assert!(parse_cores(bad).is_err(), "{bad}");
        }
    }
}
