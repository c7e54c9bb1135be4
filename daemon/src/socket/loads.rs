//! Fills in the resource usage of agents in their views.

use fermata_core::Project;
use fermata_protocol::agent::AgentView;

use crate::project::subjects;
use crate::services::Services;

/// Fills in the usage of the agents of one or several projects.
pub(super) async fn fill(services: &Services, projects: &[&Project], views: &mut [AgentView]) {
    let subjects = projects.iter().flat_map(|project| subjects(services, project)).collect();
    let samples = services.loads.sample(subjects).await;
    for view in views.iter_mut().filter(|view| view.pid.is_some()) {
        view.load = view.run.as_ref().and_then(|run| samples.get(run)).copied();
    }
}
