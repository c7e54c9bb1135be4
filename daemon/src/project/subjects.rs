//! The runs of a project whose resource usage can be sampled.

use fermata_core::Project;

use crate::load::Subject;
use crate::services::Services;
use fermata_os::process::ProcessId;

/// Returns the runs of a project that have processes.
pub fn subjects(services: &Services, project: &Project) -> Vec<Subject> {
    let dirs = services.project_dirs(&project.name);
    let of_agent = |agent: &std::sync::Arc<fermata_core::agent::Agent>| {
        let run = agent.run()?;
        let processes = run.processes.as_ref()?;
        Some(Subject {
            run: run.id.clone(),
            run_dir: dirs.run(&agent.name, &run.id),
            shim: ProcessId { pid: processes.shim_pid, start_time_ticks: processes.shim_start_ticks },
            started_at: run.started_at,
        })
    };
    project.agents.values().filter_map(of_agent).collect()
}
