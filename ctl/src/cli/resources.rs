//! What an agent may use, as flags: resources of its tree, and its budget.

use clap::Args;
use fermata_protocol::supervision::Resources;

use crate::output::time::parse_bytes;

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
    fn cores_are_read_as_percent_of_one() {
        for (text, percent) in [("1.5", 150), ("0.01", 1), ("2", 200), (" .5", 50)] {
            assert_eq!(parse_cores(text), Ok(percent), "{text}");
        }
        for bad in ["", "0", "0.001", "-1", "two", "NaN", "inf", "1e300"] {
            assert!(parse_cores(bad).is_err(), "{bad}");
        }
    }
}
