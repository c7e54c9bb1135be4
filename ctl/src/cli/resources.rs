//! What an agent may use: resource limits of its process tree, and its budget.

use clap::Args;
use fermata_protocol::budget::Budget;
use fermata_protocol::supervision::Resources;

use crate::units::parse_bytes;

/// Resource limits of an agent's process tree.
#[derive(Debug, Args, Default)]
pub struct ResourceArgs {
    /// Limit the memory of the process tree, for example 2G; the kernel kills the tree when it exceeds this.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub memory_max: Option<u64>,
    /// Limit the CPU time of the process tree to this many cores, for example 1.5.
    #[arg(long, value_name = "CORES", value_parser = parse_cores)]
    pub cpus: Option<u64>,
    /// Limit the number of processes and threads in the process tree.
    #[arg(long, value_name = "N")]
    pub pids_max: Option<u64>,
}

/// What an agent, or all agents of a project together, may spend before the project is paused.
#[derive(Debug, Args, Default, Clone, Copy)]
pub struct BudgetArgs {
    /// Pause the project after this many tokens; `none` removes the limit.
    #[arg(long, value_name = "N", value_parser = parse_tokens)]
    pub token_budget: Option<BudgetLimit>,
    /// Pause the project after this many US dollars, for example 12.50; `none` removes the limit.
    #[arg(long, value_name = "DOLLARS", value_parser = parse_dollars)]
    pub cost_budget: Option<BudgetLimit>,
}

/// A limit, or `none` on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BudgetLimit(pub Option<u64>);

impl BudgetArgs {
    pub fn is_empty(&self) -> bool {
        self.token_budget.is_none() && self.cost_budget.is_none()
    }

    /// Replaces the limits that were given; doing so ends a waiver of the budget.
    #[must_use]
    pub fn apply(self, mut budget: Budget) -> Budget {
        if let Some(BudgetLimit(tokens)) = self.token_budget {
            budget.tokens = tokens;
        }
        if let Some(BudgetLimit(cost)) = self.cost_budget {
            budget.cost_micro_usd = cost;
        }
        budget.waived &= self.is_empty();
        budget
    }
}

fn parse_tokens(text: &str) -> Result<BudgetLimit, String> {
    if text == "none" {
        return Ok(BudgetLimit(None));
    }
    let number = text.replace([',', '_'], "").parse();
    number.map(|n| BudgetLimit(Some(n))).map_err(|_| format!("'{text}' is neither a number of tokens nor 'none'"))
}

fn parse_dollars(text: &str) -> Result<BudgetLimit, String> {
    if text == "none" {
        return Ok(BudgetLimit(None));
    }
    let invalid = || format!("'{text}' is neither an amount of dollars, such as 12.50, nor 'none'");
    let dollars: f64 = text.trim_start_matches('$').parse().map_err(|_| invalid())?;
    let micro = (dollars * 1e6).round();
    if (0.0..=1e15).contains(&micro) { Ok(BudgetLimit(Some(micro as u64))) } else { Err(invalid()) }
}

impl From<ResourceArgs> for Resources {
    fn from(args: ResourceArgs) -> Self {
        Self { memory_max_bytes: args.memory_max, cpu_max_percent: args.cpus, pids_max: args.pids_max }
    }
}

/// Parses a number of cores into percent of one core.
fn parse_cores(text: &str) -> Result<u64, String> {
    let invalid = || format!("'{text}' is not a number of cores, such as 2 or 0.5 (at least 0.01)");
    let cores: f64 = text.trim().parse().map_err(|_| invalid())?;
    let percent = (cores * 100.0).round();
    // A float counts exactly up to here; the daemon has a lower limit of its own.
    if (1.0..=1e12).contains(&percent) { Ok(percent as u64) } else { Err(invalid()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_in_tokens_and_dollars() {
        assert_eq!(parse_tokens("1_000,000"), Ok(BudgetLimit(Some(1_000_000))));
        assert_eq!(parse_dollars("$12.50"), Ok(BudgetLimit(Some(12_500_000))));
        assert_eq!((parse_tokens("none"), parse_dollars("none")), (Ok(BudgetLimit(None)), Ok(BudgetLimit(None))));
        assert!(parse_tokens("-1").is_err() && parse_dollars("-1").is_err() && parse_dollars("NaN").is_err());
        let before = Budget { tokens: Some(1), cost_micro_usd: Some(2), waived: true };
        let args = BudgetArgs { token_budget: Some(BudgetLimit(None)), cost_budget: None };
        assert_eq!(args.apply(before), Budget { tokens: None, cost_micro_usd: Some(2), waived: false });
        assert_eq!(BudgetArgs::default().apply(before), before);
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
