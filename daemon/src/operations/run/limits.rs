//! The resource limits of an agent's process tree: checks them and enables the controllers before the launch.

use std::path::Path;

use fermata_protocol::supervision::Resources;
use fermata_protocol::{Code, Refusal};

use crate::errors::Failure;
use crate::operations::blocking;
use crate::services::Services;
use fermata_os::cgroup::FreezerSetting;
use fermata_os::controllers::{TreeLimits, Unavailable, make_available};
use fermata_protocol::error_chain;

/// The smallest memory limit in bytes: a shell needs more.
const MIN_MEMORY: u64 = 1 << 20;

/// The largest processor limit in percent of one core: more than any machine has, and still a valid quota for the kernel.
const MAX_CPU_PERCENT: u64 = 1_000_000;

pub fn tree_limits(resources: &Resources) -> TreeLimits {
    TreeLimits {
        memory_max_bytes: resources.memory_max_bytes,
        cpu_max_percent: resources.cpu_max_percent,
        pids_max: resources.pids_max,
    }
}

/// Checks that limits are valid and can be set on this machine; enables their controllers in the parent group of the
/// agents' groups.
///
/// # Errors
/// `invalid_params`, or `limits_unavailable` with the missing controllers and a hint.
pub async fn prepare(services: &Services, resources: &Resources) -> Result<(), Failure> {
    check(resources)?;
    let limits = tree_limits(resources);
    if limits.is_empty() {
        return Ok(());
    }
    let settings = services.settings();
    if settings.agents.freezer == FreezerSetting::Signals {
        let message = "resources cannot be limited: limits need control groups, and agents.freezer is \"signals\"";
        let hint = "set freezer = \"auto\" in the section [agents] of fermata.toml, or run the agent without limits";
        return Err(Refusal::new(Code::LimitsUnavailable, message).hint(hint).into());
    }
    blocking("enable the controllers", move || {
        let parent = settings.agents.cgroup_parent.as_deref();
        make_available(parent, &limits.controllers()).map_err(|error| unavailable(&error).into())
    })
    .await
}

fn check(resources: &Resources) -> Result<(), Refusal> {
    let invalid = |message: String| Err(Refusal::new(Code::InvalidParams, message));
    match resources {
        Resources { memory_max_bytes: Some(bytes), .. } if *bytes < MIN_MEMORY => {
            invalid(format!("'memory_max_bytes' is {bytes}, less than the {MIN_MEMORY} that any program needs"))
        }
        Resources { cpu_max_percent: Some(percent), .. } if *percent == 0 || *percent > MAX_CPU_PERCENT => {
            invalid(format!("'cpu_max_percent' is {percent}, outside 1 to {MAX_CPU_PERCENT}"))
        }
        Resources { pids_max: Some(0), .. } => invalid("'pids_max' is 0, which allows no process".into()),
        _ => Ok(()),
    }
}

fn unavailable(error: &Unavailable) -> Refusal {
    let hint = match error {
        Unavailable::NoGroups(_) => {
            "mount cgroup v2 where the daemon may write, or run the agent without limits".into()
        }
        Unavailable::NotGiven { on_v1, .. } if !on_v1.is_empty() => format!(
            "this machine has {} on cgroup v1; boot it with systemd.unified_cgroup_hierarchy=1, or run the agent without limits",
            on_v1.join(" and ")
        ),
        Unavailable::NotGiven { names, group, .. } => {
            let above = group.parent().unwrap_or(Path::new("/"));
            let enabling: Vec<String> = names.iter().map(|name| format!("+{name}")).collect();
            format!(
                "delegate them (Delegate=yes in a unit; elsewhere echo '{}' > {}/cgroup.subtree_control), \
                 or set agents.cgroup_parent in fermata.toml to a group that has them",
                enabling.join(" "),
                above.display()
            )
        }
        Unavailable::Occupied { .. } => {
            "put systemd/drop-ins/fermatad.service.d/controllers.conf in place (systemd 254), \
             or set agents.cgroup_parent in fermata.toml to a group without processes"
                .into()
        }
        Unavailable::Refused { .. } => {
            "set agents.cgroup_parent in fermata.toml to a group that belongs to the daemon's user".to_owned()
        }
    };
    Refusal::new(Code::LimitsUnavailable, format!("resources cannot be limited: {}", error_chain(error)))
        .hint(hint)
        .details(serde_json::json!({ "controllers": missing(error) }))
}

/// Returns the names of the controllers that are missing.
fn missing(error: &Unavailable) -> &[&'static str] {
    match error {
        Unavailable::NotGiven { names, .. } | Unavailable::Refused { names, .. } => names,
        Unavailable::NoGroups(_) | Unavailable::Occupied { .. } => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_allow_no_program_are_refused_by_name() {
        let bad = [
            (Resources { memory_max_bytes: Some(4096), ..Resources::default() }, "memory_max_bytes"),
            (Resources { cpu_max_percent: Some(0), ..Resources::default() }, "cpu_max_percent"),
            (Resources { cpu_max_percent: Some(u64::MAX), ..Resources::default() }, "cpu_max_percent"),
            (Resources { pids_max: Some(0), ..Resources::default() }, "pids_max"),
        ];
        for (resources, name) in bad {
            let refusal = check(&resources).expect_err(name);
            assert!(refusal.code == Code::InvalidParams && refusal.message.contains(name), "{refusal:?}");
        }
        let good = Resources { memory_max_bytes: Some(MIN_MEMORY), cpu_max_percent: Some(1), pids_max: Some(1) };
        assert_eq!(check(&good), Ok(()));
    }

    #[test]
    fn every_reason_says_what_to_do() {
        let group = || Path::new("/g/fermata").to_path_buf();
        let given = unavailable(&Unavailable::NotGiven { names: vec!["cpu", "memory"], group: group(), on_v1: vec![] });
        assert!(given.message.contains("/g/fermata does not have the cpu and the memory controller"), "{given:?}");
        assert!(given.hint.as_ref().is_some_and(|h| h.contains("echo '+cpu +memory' > /g/cgroup.subtree_control")));
        let v1 = unavailable(&Unavailable::NotGiven { names: vec!["pids"], group: group(), on_v1: vec!["pids"] });
        assert!(v1.hint.as_ref().is_some_and(|h| h.contains("this machine has pids on cgroup v1")), "{v1:?}");
        let busy = unavailable(&Unavailable::Occupied { group: group() });
        assert!(busy.hint.as_ref().is_some_and(|h| h.contains("controllers.conf")), "{busy:?}");
    }
}
